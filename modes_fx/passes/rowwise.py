"""Whether an operation between the GEMMs works row by row, so that rows may be left out.

PyTorch's operations only: pointwise ones (by the tag that it gives them) whose other operands do not vary along the rows,
grouped GEMMs over the site's own groups and linear layers, products of one matrix a row, and structural or reducing ones that
leave dimension 0 alone: rows stay there, from the gathered tokens to the weighted output. Anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx

from modes_fx.passes.site import Reject
from modes_fx.passes.values import value_of

_IN_PLACE_OPERATORS = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "ipow": "pow", "truediv": "div"}
_CASTS = {"to", "float", "half", "bfloat16", "double", "type_as", "contiguous", "clone", "detach", "dropout"}
_POINTWISE = {"hardswish", "logsigmoid", "log_sigmoid", "softsign"}  # composites, which carry no tag
GROUPED = {"_grouped_mm", "grouped_mm", "grouped_mm_fallback"}
_NORMS = {"rms_norm", "layer_norm"}
_A_MATRIX_A_ROW = {"bmm", "baddbmm", "matmul"}
_JOINS = {"cat", "concat", "stack"}
_OVER_A_DIM = {
    "chunk", "split", "unbind", "unsqueeze", "squeeze", "sum", "mean", "amax", "amin", "norm", "softmax", "log_softmax",
    "cumsum", "narrow", "select", "flip", "roll",
}  # fmt: skip
_DIM_POSITION = {"chunk": 2, "split": 2, "roll": 2, "norm": 2}  # of the argument `dim`; 1 in all others
_DIM_KEYWORD = {"flip": "dims", "roll": "dims"}  # "dim" in all others
_DIMS_ONE_BY_ONE = {"flip", "squeeze"}  # x.flip(0, 1)
_PAIR_OF_DIMS = {"transpose": ("dim0", "dim1"), "swapaxes": ("axis0", "axis1")}
_NAMESPACES = {"aten", "transformers"}
_MODULES = {"torch", "_operator"}


def is_in_place(node: fx.Node) -> bool:
    """Return whether a call changes its first argument."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_method":
        return name.endswith("_") and not name.endswith("__")
    return node.op == "call_function" and (name in _IN_PLACE_OPERATORS and name[0] == "i")


def check(node: fx.Node, body: Collection[fx.Node], offsets: fx.Node | None = None) -> None:
    """Refuse a node of the body that may mix rows, or that depends on how many there are.

    Args:
        node: The node.
        body: All nodes that hold rows of pairs, in dimension 0, or tuples of such.
        offsets: Ends of the groups of rows, where rows are sorted by expert.

    Raises:
        Reject: ``BODY_MIXES_ROWS`` or ``BODY_HAS_FIXED_ROWS``.
    """
    name = name_of(node)
    if not _works_by_row(node, name, body, offsets):
        raise Reject("BODY_MIXES_ROWS", f"{node.name} ({name}) is not known to work row by row", node)
    if name in ("view", "reshape"):
        _check_view(node)


def _works_by_row(node: fx.Node, name: str, body: Collection[fx.Node], offsets: fx.Node | None) -> bool:
    inside = [item for item in node.all_input_nodes if item in body]
    source = _argument(node, 0, "input", None)
    if not _is_of_torch(node.target) or "out" in node.kwargs or (is_in_place(node) and source not in inside):
        return False
    if name in _CASTS or name in _POINTWISE or _is_tagged_pointwise(name):
        return _aligns_rows(node, inside)
    if is_in_place(node):  # what others hold would change its dimensions
        return False
    if name in _JOINS:
        parts = _argument(node, 0, "tensors", ())
        ndim = _ndim(inside[0]) + (name == "stack")
        return all(item in inside for item in parts) and _leaves_rows_alone(_argument(node, 1, "dim", 0), ndim)
    if name in _A_MATRIX_A_ROW:
        return all(item in inside and _ndim(item) == _ndim(inside[0]) > 2 for item in node.all_input_nodes)
    return inside == [source] and _works_by_row_of(source, node, name, offsets)


def _works_by_row_of(source: fx.Node, node: fx.Node, name: str, offsets: fx.Node | None) -> bool:
    """Judge an operation that takes rows as its first argument and nowhere else."""
    if not isinstance(value_of(source), Tensor):  # a tuple, such as chunk's
        return name == "getitem" and isinstance(node.args[1], int)
    ndim = _ndim(source)
    if name in GROUPED:
        matrices = _argument(node, 1, "mat2", None)
        known = offsets is not None and offsets in node.all_input_nodes
        return known and ndim == 2 and isinstance(matrices, fx.Node) and _ndim(matrices) == 3
    if name == "linear":
        return ndim > 1
    if name in _NORMS:
        shape = _argument(node, 1, "normalized_shape", ())
        return isinstance(shape, (tuple, list)) and 0 < len(shape) < ndim
    if name == "getitem":
        return _keeps_rows(node.args[1], ndim)
    if name == "flatten":
        return _leaves_rows_alone(_argument(node, 1, "start_dim", 0), ndim)
    if name in _PAIR_OF_DIMS:
        pair = tuple(_argument(node, place, keyword, None) for place, keyword in enumerate(_PAIR_OF_DIMS[name], start=1))
        return _leaves_rows_alone(pair, ndim)
    if name in _OVER_A_DIM:
        position = _DIM_POSITION.get(name, 1)
        one_by_one = name in _DIMS_ONE_BY_ONE and len(node.args) > position + 1
        dim = node.args[position:] if one_by_one else _argument(node, position, _DIM_KEYWORD.get(name, "dim"), None)
        return _leaves_rows_alone(dim, ndim + (name == "unsqueeze"))
    return name in ("view", "reshape")


def name_of(node: fx.Node) -> str:
    """Return the name of what a node calls, without the underscore of an in-place form."""
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    name = name.split(".")[0] if isinstance(target, torch._ops.OpOverload) else name
    name = _IN_PLACE_OPERATORS.get(name, name)
    return name if name.startswith("_") else name.rstrip("_")


def _is_of_torch(target: Any) -> bool:
    """Return whether a target is what its name says: anybody may call an operator or a function ``add``."""
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace in _NAMESPACES
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name.split("::")[0] in _NAMESPACES
    return isinstance(target, str) or str(getattr(target, "__module__", "")).split(".")[0] in _MODULES


def _is_tagged_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    return packet is not None and any(torch.Tag.pointwise in getattr(packet, item).tags for item in packet.overloads())


def _aligns_rows(node: fx.Node, inside: Collection[fx.Node]) -> bool:
    """Return whether all operands with rows have them where the result has, and no other differs from row to row.

    Operands with fewer dimensions than the result are lined up with its last ones; ``max`` and ``where``, which share their
    names with pointwise forms, return fewer dimensions or a tuple in others.
    """
    result = value_of(node)
    if not isinstance(result, Tensor):
        return False
    ndim = result.dim()
    outside = [value_of(item) for item in node.all_input_nodes if item not in inside]
    varies = any(isinstance(value, Tensor) and value.dim() == ndim and value.shape[0] != 1 for value in outside)
    return not varies and all(_ndim(item) == ndim for item in inside)


def _ndim(node: fx.Node) -> int:
    value = value_of(node)
    return value.dim() if isinstance(value, Tensor) else -1


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _leaves_rows_alone(dim: Any, ndim: int) -> bool:
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    return bool(dims) and all(isinstance(item, int) and item not in (0, -ndim) for item in dims)


def _keeps_rows(index: Any, ndim: int) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    if not items or not all(item is None or item is Ellipsis or type(item) in (int, slice) for item in items):
        return False  # a tensor as index may move dimensions
    named = sum(item is not None and item is not Ellipsis for item in items)
    return named < ndim if items[0] is Ellipsis else items[0] == slice(None)


def names_rows(view: fx.Node) -> bool:
    """Return whether a view is given the number of rows, instead of -1."""
    sizes = view.args[1] if len(view.args) == 2 and isinstance(view.args[1], (tuple, list)) else view.args[1:]
    return bool(not sizes or sizes[0] != -1)


def _check_view(node: fx.Node) -> None:
    if names_rows(node):
        raise Reject("BODY_HAS_FIXED_ROWS", f"{node.name} names the number of pairs", node)
    if value_of(node).shape[0] != _rows_before(node):
        raise Reject("BODY_MIXES_ROWS", f"{node.name} folds rows into other dimensions", node)


def _rows_before(node: fx.Node) -> Any:
    source = node.args[0]
    return value_of(source).shape[0] if isinstance(source, fx.Node) else None
