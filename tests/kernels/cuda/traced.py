"""Trace the operations down to what Inductor gets, without a GPU, and print what that calls, as JSON.

``python -m tests.kernels.cuda.traced``: a process of its own, since Triton's interpreter is chosen when it is imported.
"""

import ast
import contextlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.config as inductor_config
import triton
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor.graph import GraphLowering
from triton.backends.compiler import GPUTarget

from modes_fx.kernels.cuda import ops
from modes_fx.kernels.cuda.sizes import flattened, pair_sizes_to_try, sizes_to_try

TOKENS, HIDDEN, INNER, TOP_K, EXPERTS = 16, 64, 32, 2, 8
SIZES = sizes_to_try((9, 0), TOKENS * TOP_K / EXPERTS, 2)
PAIR_SIZES = pair_sizes_to_try(True, 2)
SILU = "return a * tl.sigmoid(a) * b"


class H100:
    """Triton's driver, as far as traces ask it."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def block(x: Tensor, experts: Tensor, first: Tensor, second: Tensor, bias: Tensor, weights: Tensor, tried: bool) -> Tensor:
    sizes, pair_sizes = (flattened(some if tried else some[:1]) for some in (SIZES, PAIR_SIZES))
    key, order = torch.sort(experts, stable=True)
    index = torch.arange(EXPERTS, dtype=torch.int32, device=x.device)
    blocks = ops.cut_rows(torch.searchsorted(key, index, right=True, out_int32=True), order, sizes[0])
    y = ops.block_linear(x, order, blocks, first, None, TOP_K, False, "halves", SILU, sizes)
    z = ops.block_linear(y, order, blocks, second, bias, 0, True, "", "return a + bias_a", sizes)
    total = ops.pair_sum(z, experts, weights, TOP_K, EXPERTS)
    y = ops.pair_linear(x, experts, first, None, TOP_K, "halves", SILU, pair_sizes)
    return total + ops.pair_combine(y, experts, weights, second, None, TOP_K, "", pair_sizes)


def calls(dynamic: bool, tried: bool) -> list[str]:
    """Return what the graph calls, of programs with what they change and how many sizes they try."""
    called: list[str] = []

    def keep(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        for node in module.graph.nodes:
            if node.op == "call_function":
                called.append(str(node.target))
                if "tensors_to_clone" in node.kwargs:
                    program = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
                    assert len(node.kwargs["grid"]) == len(getattr(program, "configs", [None]))
                    called[-1] += f" changes {', '.join(node.kwargs['tensors_to_clone'])}, of {len(node.kwargs['grid'])} sizes"
        return lambda *args: [torch.empty(TOKENS, HIDDEN)]

    run(aot_autograd(fw_compiler=keep), dynamic, tried)
    return called


def sizes_in_code() -> list[int]:
    """Return how many sizes each program of Inductor's own code tries, 0 for one that has but one, and of how many grids."""
    written: list[str] = []

    def keep(code: str) -> None:
        written.append(code)
        raise StopIteration  # it cannot run here

    with patch.object(GraphLowering, "save_output_code", keep), contextlib.suppress(Exception):
        run("inductor", dynamic=True, tried=True)
    configs = [ast.literal_eval(found) for found in re.findall(r"configs=(\[.*?\]),\n", written[0])]
    assert [len(some) for some in configs if some] == [
        code.count("'python':") for code in re.findall(r"precomputed_grids.*", written[0])
    ]
    assert written[0].count("def _epilogue(") == 4
    return [len(some) for some in configs]


def run(backend: Any, dynamic: bool, tried: bool) -> None:
    pairs = TOKENS * TOP_K
    given = (
        torch.randn(TOKENS, HIDDEN), torch.zeros(pairs, dtype=torch.int32), torch.randn(EXPERTS, 2 * INNER, HIDDEN),
        torch.randn(EXPERTS, HIDDEN, INNER), torch.randn(EXPERTS, HIDDEN), torch.rand(pairs),
    )  # fmt: skip
    torch._dynamo.reset()
    for tensor in (given[0], given[1], given[5]) if dynamic else ():
        torch._dynamo.mark_dynamic(tensor, 0)
    with torch.no_grad(), inductor_config.patch(fx_graph_cache=False):
        torch.compile(block, backend=backend, fullgraph=True)(*given, tried)


if __name__ == "__main__":
    triton.runtime.driver.set_active(H100())
    traced = {tried: [calls(dynamic, tried == "several") for dynamic in (False, True)] for tried in ("one", "several")}
    json.dump({**traced, "code": sizes_in_code()}, sys.stdout)
