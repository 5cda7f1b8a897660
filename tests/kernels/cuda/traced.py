"""Trace the operations down to what Inductor gets, without a GPU, and print what that calls, as a JSON list.

``python -m tests.kernels.cuda.traced``: a process of its own, since Triton's interpreter is chosen when it is imported.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

import torch
import triton
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget

from modes_fx.kernels.cuda import ops
from modes_fx.kernels.cuda.sizes import size_of

TOKENS, HIDDEN, INNER, TOP_K, EXPERTS = 16, 64, 32, 2, 8
SIZE = list(astuple(size_of((9, 0), TOKENS * TOP_K / EXPERTS)))


class H100:
    """Triton's driver, as far as traces ask it."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def block(x: Tensor, experts: Tensor, first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    key, order = torch.sort(experts, stable=True)
    index = torch.arange(EXPERTS, dtype=torch.int32)
    blocks = ops.cut_rows(torch.searchsorted(key, index, right=True, out_int32=True), order, SIZE[0])
    y = ops.block_linear(x, order, blocks, first, TOP_K, False, "silu", SIZE)
    total = ops.pair_sum(ops.block_linear(y, order, blocks, second, 0, True, "", SIZE), experts, weights, TOP_K, EXPERTS)
    return total + ops.pair_combine(ops.pair_linear(x, experts, first, TOP_K, "silu"), experts, weights, second, TOP_K)


def calls(dynamic: bool) -> list[str]:
    called: list[str] = []

    def keep(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        for node in module.graph.nodes:
            if node.op == "call_function":
                changed = f" changes {', '.join(node.kwargs['tensors_to_clone'])}" if "tensors_to_clone" in node.kwargs else ""
                called.append(f"{node.target}{changed}")
        return lambda *args: [torch.empty(TOKENS, HIDDEN)]

    pairs = TOKENS * TOP_K
    given = (
        torch.randn(TOKENS, HIDDEN), torch.zeros(pairs, dtype=torch.int32), torch.randn(EXPERTS, 2 * INNER, HIDDEN),
        torch.randn(EXPERTS, HIDDEN, INNER), torch.rand(pairs),
    )  # fmt: skip
    torch._dynamo.reset()
    for tensor in (given[0], given[1], given[4]) if dynamic else ():
        torch._dynamo.mark_dynamic(tensor, 0)
    with torch.no_grad():
        torch.compile(block, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(*given)
    return called


if __name__ == "__main__":
    triton.runtime.driver.set_active(H100())
    json.dump([calls(dynamic) for dynamic in (False, True)], sys.stdout)
