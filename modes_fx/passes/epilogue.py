"""What a site does behind a GEMM, as lines of Triton for the GEMM's own program: no pass over rows of its own.

::

    y = gemm(x, W) + bias[row_ids]                           block_linear(..., bias, parts="halves", epilogue='''
    gate, up = y.chunk(2, dim=-1)                     ->         v0 = a + bias_a
    z = silu(gate) * up                                          ...''')

Taken: arithmetic and the usual activations, clamps, biases of each expert, and one split of the columns, into halves or into
even and odd ones; as far behind the GEMM as nothing but a last value is used by others. Numbers stay float32 in between, as in
what Inductor generates. Left to Inductor, which computes it on all rows: whatever else there is, such as norms over a row or
what combines two GEMMs.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from modes_fx.passes.gemms import uncast
from modes_fx.passes.rowwise import GROUPED, is_in_place, name_of
from modes_fx.passes.values import value_of
from modes_fx.passes.walk import argument, gathers, input_of, is_getitem

_SAME = {"to", "float", "half", "bfloat16", "type_as", "contiguous", "detach"}
_UNARY = {
    "neg": "-{0}",
    "abs": "tl.abs({0})",
    "square": "{0} * {0}",
    "exp": "tl.exp({0})",
    "sqrt": "tl.sqrt({0})",
    "rsqrt": "tl.rsqrt({0})",
    "sigmoid": "tl.sigmoid({0})",
    "tanh": "2.0 * tl.sigmoid(2.0 * {0}) - 1.0",
    "silu": "{0} * tl.sigmoid({0})",
    "relu": "tl.maximum({0}, 0.0, propagate_nan=tl.PropagateNan.ALL)",
    "gelu": "0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))",
    "gelu_tanh": "{0} * tl.sigmoid(1.5957691216057308 * ({0} + 0.044715 * {0} * {0} * {0}))",  # tanh(z) = 2 sigmoid(2z) - 1
}
_BINARY = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "minimum": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "maximum": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
}
_BOUNDS = {"clamp": (1, 2), "clip": (1, 2), "clamp_min": (1, None), "clamp_max": (None, 1)}
"""Positions of the lower and the upper one."""
_STRIPES = {(None, None, 2): 0, (0, None, 2): 0, (1, None, 2): 1}

Value = tuple[str, ...]
"""A node's value by part: both parts of what is as wide as the product, or the one that is half as wide."""


@dataclass(frozen=True)
class Epilogue:
    """What the program of a GEMM computes besides.

    Attributes:
        end: The node whose value the program gives; the GEMM itself where nothing is taken.
        parts: "", "halves" or "interleaved"; see ``kernels.cuda.ops``.
        text: Lines of Triton; "" for none.
        bias: [E, N] or [E, 2 * N], or None.
        nodes: What is computed within the program, in graph order.
    """

    end: fx.Node
    parts: str = ""
    text: str = ""
    bias: fx.Node | None = None
    nodes: tuple[fx.Node, ...] = ()


def epilogue_of(gemm: fx.Node, body: Collection[fx.Node], row_ids: fx.Node) -> Epilogue:
    """Return all that can be taken into a GEMM's program.

    Args:
        gemm: The GEMM.
        body: The site's nodes, in graph order.
        row_ids: The expert of each row, by which biases are gathered.
    """
    found = [_Writer(gemm, row_ids, parts).longest(body) for parts in ("halves", "interleaved", "")]
    return max(found, key=lambda epilogue: len(epilogue.nodes))


def point_behind_changes(body: Collection[fx.Node]) -> None:
    """Let what comes behind an in-place call use the call's result, which is the same tensor."""
    for node in body:
        if is_in_place(node):
            later: set[fx.Node] = set()
            behind = node.next
            while behind.op != "root":
                later.add(behind)
                behind = behind.next
            input_of(node).replace_all_uses_with(node, delete_user_cb=later.__contains__)


@dataclass
class _Writer:
    """Walks on from a GEMM whose columns are taken in one way, and writes down what it can."""

    gemm: fx.Node
    row_ids: fx.Node
    parts: str
    values: dict[fx.Node, Any] = field(default_factory=dict)  # tuples of values where a node's value is one
    lines: dict[fx.Node, list[str]] = field(default_factory=dict)
    biases: dict[fx.Node, fx.Node] = field(default_factory=dict)  # gathered -> table

    def longest(self, body: Collection[fx.Node]) -> Epilogue:
        self.values[self.gemm] = ("a", "b") if self.parts else ("a",)
        for node in body:
            if node is not self.gemm and node not in self.values:
                value = self._value(node)
                if value is not None:
                    self.values[node] = value
        for end in reversed(list(self.values)[1:]):
            if (found := self._ending(end)) is not None:
                return found
        return Epilogue(self.gemm)

    def _ending(self, end: fx.Node) -> Epilogue | None:
        """Return the epilogue that gives this node's value, if the program can give it and all others are its own."""
        value = self.values[end]
        taken = self._needed(end)
        tables = {self.biases[node] for node in taken if node in self.biases}
        own = [node for node in taken if node not in self.biases and node is not end]
        if end in self.biases or self.gemm not in taken or len(tables) > 1 or len(value) != 1 or not isinstance(value[0], str):
            return None
        if _dtype(end) is not _dtype(self.gemm) or any(user not in taken for node in own for user in node.users):
            return None
        lines = [line for node in taken for line in self.lines.get(node, ())]
        return Epilogue(end, self.parts, "\n".join([*lines, f"return {value[0]}"]), next(iter(tables), None), tuple(taken))

    def _needed(self, end: fx.Node) -> list[fx.Node]:
        found = {end}
        for node in reversed(list(self.values)):  # in graph order
            if node in found:
                found.update(source for source in node.all_input_nodes if source in self.values)
        return [node for node in self.values if node in found]

    def _value(self, node: fx.Node) -> Any:
        """Return a node's value, None where it cannot be written down."""
        name = name_of(node)
        if gathers(node, self.row_ids):
            return self._bias(node)
        source: Any = node.args[0] if node.args else None
        of: Any = self.values.get(source) if isinstance(source, fx.Node) else None
        if is_in_place(node) and not (of and len(source.users) == 1 and (source is self.gemm or source in self.lines)):
            return None  # others see what it changes
        if name in _BINARY or name in _UNARY or name == "pow":
            return self._computed(node, name)
        if of is None:
            return None
        if name in _SAME:
            return of if _at_least_as_precise(node, self.gemm) else None
        if name in ("chunk", "split"):
            dim = argument(node, 2, "dim")
            count = argument(node, 1, "chunks" if name == "chunk" else "split_size_or_sections")
            asked = 2 if name == "chunk" else _columns(source) // 2
            fits = self.parts == "halves" and self._is_whole(of) and dim in (-1, 1) and count == asked
            return ((of[0],), (of[1],)) if fits else None
        if name == "getitem":
            return self._item(node, of)
        if name in _BOUNDS:
            return self._clamped(node, name, of)
        return None

    def _bias(self, node: fx.Node) -> Value | None:
        table: Any = node.args[0]
        shape = value_of(table).shape
        if len(shape) != 2 or shape[1] != _columns(self.gemm):
            return None
        self.biases[node] = table
        return ("bias_a", "bias_b") if self.parts else ("bias_a",)

    def _item(self, node: fx.Node, of: Any) -> Value | None:
        index = node.args[1]
        if isinstance(of[0], tuple):
            return next((of[place] for place in (0, 1) if is_getitem(node, place)), None)
        if not (self._is_whole(of) and isinstance(index, tuple) and len(index) == 2 and isinstance(index[1], slice)):
            return None
        if index[0] not in (Ellipsis, slice(None)):
            return None
        bounds, half = (index[1].start, index[1].stop, index[1].step), _columns(self.gemm) // 2
        halves = {(None, half, None): 0, (0, half, None): 0, (half, None, None): 1, (half, 2 * half, None): 1}
        place = (halves if self.parts == "halves" else _STRIPES).get(bounds)
        return None if place is None else (of[place],)

    def _clamped(self, node: fx.Node, name: str, of: Value) -> Value | None:
        positions = zip(_BOUNDS[name], ("min", "max"), strict=True)
        low, high = (None if position is None else argument(node, position, keyword) for position, keyword in positions)
        if not all(bound is None or isinstance(bound, (int, float)) for bound in (low, high)) or isinstance(of[0], tuple):
            return None
        forms = "{0}"
        if low is not None and low != -math.inf:
            forms = _BINARY["maximum"].format(forms, _number(low))
        if high is not None and high != math.inf:
            forms = _BINARY["minimum"].format(forms, _number(high))
        return self._written(node, [forms.format(part) for part in of])

    def _computed(self, node: fx.Node, name: str) -> Value | None:
        named, given = dict(node.kwargs), list(node.args)
        if name == "gelu" and named.pop("approximate", "none") == "tanh":
            name = "gelu_tanh"
        if name in _UNARY and named.get("inplace") is False:
            del named["inplace"]
        if name == "pow" and given[1:] == [2]:
            name, given = "square", given[:1]
        form, count = (_UNARY[name], 1) if name in _UNARY else (_BINARY.get(name), 2)
        if form is None or named or len(given) != count:
            return None
        values = [value for item in given if (value := self._operand(item)) is not None]
        width = max((len(value) for value in values), default=0)
        columns = [
            value * width if len(value) < width and not isinstance(item, fx.Node) else value
            for item, value in zip(given, values, strict=False)
        ]
        if len(values) < count or any(len(value) != width or isinstance(value[0], tuple) for value in columns):
            return None  # what is not known, or half as wide as the other
        return self._written(node, [form.format(*parts) for parts in zip(*columns, strict=True)])

    def _operand(self, item: Any) -> Value | None:
        if isinstance(item, fx.Node):
            value: Value | None = self.values.get(item)
            return value
        return (_number(item),) if type(item) in (int, float) and math.isfinite(item) else None

    def _written(self, node: fx.Node, expressions: list[str]) -> Value:
        names = tuple(f"v{len(self.lines)}{'_b' * index}" for index in range(len(expressions)))
        self.lines[node] = [f"{name} = {expression}" for name, expression in zip(names, expressions, strict=True)]
        return names

    def _is_whole(self, value: Any) -> bool:
        return len(value) == 2 and isinstance(value[0], str)


def _number(value: float) -> str:
    return repr(float(value))


def _columns(node: Any) -> int:
    return int(value_of(node).shape[-1])


def _dtype(node: fx.Node) -> Any:
    value = value_of(node)
    return value.dtype if isinstance(value, Tensor) else None


def _at_least_as_precise(node: fx.Node, gemm: fx.Node) -> bool:
    return _dtype(node) in (_dtype(gemm), torch.float32)


def leaves_rows_alone(epilogues: dict[fx.Node, Epilogue], weighted: fx.Node) -> bool:
    """Return whether a site's programs do all its work: each one's result goes to another, or is weighted."""
    return all(
        user is weighted or name_of(user) in GROUPED for epilogue in epilogues.values() for user in _readers(epilogue.end)
    )


def _readers(node: fx.Node) -> list[fx.Node]:
    """Return the users of a node's value, also through conversions that change nothing."""
    return [reader for user in node.users for reader in (_readers(user) if uncast(user) is not user else [user])]
