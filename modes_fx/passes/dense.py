"""Linear layers around the experts, where they may meet few rows: routers, shared experts, projections of a decoder layer.

While decoding they do little but read their weights, which ATen's product on a CPU does at half of the rate of memory. So each
``linear`` of a graph that has a routing site becomes ``modes_fx.dense``, which leaves many rows to ATen. Those that surely meet
many stay as they are, and so does what the kernels do not take: other devices and dtypes, gradients, quantised weights, and
weights that do not lie along the inner dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from modes_fx.kernels.cpu.ops import DTYPES, FEW_ROWS
from modes_fx.passes.emit import Emitter
from modes_fx.passes.values import value_of
from modes_fx.passes.walk import argument, calls


def rewrite(graph: fx.Graph) -> None:
    """Rewrite the linear layers of a graph in place."""
    if torch.is_grad_enabled():
        return
    for node in list(graph.nodes):
        if calls(node, nn.functional.linear) and _suits(node):
            given = [argument(node, position, name) for position, name in enumerate(("input", "weight", "bias"))]
            (product,) = Emitter(before=node).trace(_dense, *(item for item in given if item is not None))
            node.replace_all_uses_with(product)
            graph.erase_node(node)


def _suits(node: fx.Node) -> bool:
    x, weight = (value_of(argument(node, position, name)) for position, name in enumerate(("input", "weight")))
    if weight.dim() != 2 or weight.stride(1) != 1 or any(is_traceable_wrapper_subclass(value) for value in (x, weight)):
        return False
    dtypes = {value.dtype for value in (x, weight, value_of(node))}  # several under autocast
    many = statically_known_true(x.numel() > FEW_ROWS * weight.shape[1])
    return weight.device.type == "cpu" and len(dtypes) == 1 and dtypes <= DTYPES and not many


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.modes_fx.dense.default(x, weight, bias)
    return product
