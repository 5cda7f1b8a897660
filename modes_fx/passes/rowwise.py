"""Whether an operation between the GEMMs works row by row, so that rows may be left out.

Known operations only: pointwise ones (by the tag that PyTorch gives them) whose other operands do not vary along the rows,
grouped GEMMs and linear layers, products of one matrix a row, and structural or reducing ones that leave dimension 0 alone.
Anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from modes_fx.passes.site import Reject

_IN_PLACE_OPERATORS = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "ipow": "pow", "truediv": "div"}
_CASTS = {"to", "float", "half", "bfloat16", "double", "type_as", "contiguous", "clone", "detach", "dropout"}
_POINTWISE = {"hardswish", "logsigmoid", "log_sigmoid", "softsign"}  # composites, which carry no tag
_ROWS_OF_MATRICES = {"_grouped_mm", "grouped_mm", "grouped_mm_fallback", "linear", "rms_norm", "layer_norm"}
_A_MATRIX_A_ROW = {"bmm", "baddbmm", "matmul"}
_OVER_A_DIM = {
    "chunk", "split", "unbind", "unsqueeze", "squeeze", "sum", "mean", "amax", "amin", "norm", "softmax", "log_softmax",
    "cumsum", "narrow", "select", "flip", "roll",
}  # fmt: skip
_DIM_POSITION = {"chunk": 2, "split": 2, "roll": 2}  # of the argument `dim`; 1 in all others
_PAIR_OF_DIMS = {"transpose", "swapaxes"}


def is_in_place(node: fx.Node) -> bool:
    """Return whether a call changes its first argument."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_method":
        return name.endswith("_") and not name.endswith("__")
    return node.op == "call_function" and (name in _IN_PLACE_OPERATORS and name[0] == "i")


def check(node: fx.Node, body: Collection[fx.Node]) -> None:
    """Refuse a node of the body that may mix rows, or that depends on how many there are.

    Raises:
        Reject: ``BODY_MIXES_ROWS`` or ``BODY_HAS_FIXED_ROWS``.
    """
    args: tuple[Any, ...] = node.args
    name = _name(node)
    inside = [item for item in node.all_input_nodes if item in body]
    ndim = max((value.dim() for item in inside if isinstance(value := item.meta.get("example_value"), Tensor)), default=1)
    if name in _ROWS_OF_MATRICES:
        allowed = inside == [args[0]]
    elif name in _A_MATRIX_A_ROW:
        allowed = ndim > 2 and all(_is_rows(item, body, ndim) for item in node.all_input_nodes)
    elif name == "getitem":
        allowed = _keeps_rows(args[1], unpacks=not isinstance(inside[0].meta.get("example_value"), Tensor))
    elif name in ("view", "reshape"):
        _check_view(node)
        allowed = True
    elif name == "flatten":
        allowed = _argument(node, 1, "start_dim", 0) % max(ndim, 1) != 0
    elif name in _PAIR_OF_DIMS:
        allowed = all(dim % ndim != 0 for dim in args[1:3])
    elif name in _OVER_A_DIM:
        dims = ndim + 1 if name == "unsqueeze" else ndim
        allowed = _leaves_rows_alone(_argument(node, _DIM_POSITION.get(name, 1), "dim", None), dims)
    elif name in ("cat", "stack", "concat"):
        allowed = len(inside) == len(args[0]) and _leaves_rows_alone(_argument(node, 1, "dim", 0), ndim)
    else:
        allowed = (name in _CASTS or name in _POINTWISE or _is_tagged_pointwise(name)) and not _varies_by_row(node, body)
    if not allowed:
        raise Reject("BODY_MIXES_ROWS", f"{node.name} ({name}) is not known to work row by row", node)


def _name(node: fx.Node) -> str:
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    name = name.split(".")[0] if isinstance(target, torch._ops.OpOverload) else name
    name = _IN_PLACE_OPERATORS.get(name, name)
    return name if name.startswith("_") else name.rstrip("_")


def _is_tagged_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    return packet is not None and any(torch.Tag.pointwise in getattr(packet, item).tags for item in packet.overloads())


def _varies_by_row(node: fx.Node, body: Collection[fx.Node]) -> bool:
    """Return whether an operand from outside differs from row to row: a table by position, say."""
    ndim = node.meta["example_value"].dim()
    outside = [item.meta.get("example_value") for item in node.all_input_nodes if item not in body]
    return any(isinstance(value, Tensor) and value.dim() == ndim and value.shape[0] != 1 for value in outside)


def _is_rows(node: fx.Node, body: Collection[fx.Node], ndim: int) -> bool:
    return node in body and node.meta["example_value"].dim() == ndim


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _leaves_rows_alone(dim: Any, ndim: int) -> bool:
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    return bool(dims) and all(isinstance(item, int) and item not in (0, -ndim) for item in dims)


def _keeps_rows(index: Any, *, unpacks: bool) -> bool:
    if unpacks:  # of a tuple, such as chunk's
        return isinstance(index, int)
    first = index[0] if isinstance(index, tuple) else index
    return first is Ellipsis or first == slice(None)


def names_rows(view: fx.Node) -> bool:
    """Return whether a view is given the number of rows, instead of -1."""
    sizes = view.args[1] if len(view.args) == 2 and isinstance(view.args[1], (tuple, list)) else view.args[1:]
    return bool(not sizes or sizes[0] != -1)


def _check_view(node: fx.Node) -> None:
    if names_rows(node):
        raise Reject("BODY_HAS_FIXED_ROWS", f"{node.name} names the number of pairs", node)
    if node.meta["example_value"].shape[0] != _rows_before(node):
        raise Reject("BODY_MIXES_ROWS", f"{node.name} folds rows into other dimensions", node)


def _rows_before(node: fx.Node) -> Any:
    source = node.args[0]
    return source.meta["example_value"].shape[0] if isinstance(source, fx.Node) else None
