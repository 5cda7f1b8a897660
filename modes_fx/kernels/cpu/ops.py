"""The kernels as torch operations, which FX passes insert and Inductor calls.

Shapes: T tokens, K experts a token, S = T * K pairs, R kept pairs (rows, sorted by expert), E experts, D inner, N outer size.
A *pair* is token * K + rank. ``offsets`` int64 [E + 1]: the rows of expert e are ``offsets[e]`` to ``offsets[e + 1]``. They run
on a CPU and have no gradients::

    sort_pairs(keep, expert_ids, num_experts) -> pairs, offsets

Sort the kept pairs (keep bool [S]) by expert (integers [S]), and within an expert as they come: pairs int64 [R], and offsets.
``IndexError`` if the expert of a kept pair is not in [0, E). ::

    linear(x, pairs, top_k, weight, offsets) -> y

Multiply each row by its expert's weight, which is of x's dtype, [E, N, D], contiguous along D: y [R, N]. x is float32 or
bfloat16 [T, D], of which row ``pairs[r] // top_k`` is taken; or [R, D] where pairs is None. ::

    linear_combine(x, pairs, top_k, row_weights, weight, offsets, tokens) -> total

Multiply each row of x [R, D] by its expert's weight and by its routing weight (float32 [R]), and add up the rows of each token:
total float32 [T, N]. ::

    dense(x, weight, bias) -> y

Multiply x [..., D] by a weight [N, D] that is no expert's and add a bias [N] or None, as torch's ``linear`` does: y [..., N].

``linear_packed`` and ``linear_combine_packed`` are the same with the blocks of a ``packed.PackedWeight`` as the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modes_fx.kernels.cpu import library

DTYPES = frozenset({torch.float32, torch.bfloat16})
FEW_ROWS = 16
"""So many rows ``dense`` multiplies itself; more it leaves to ATen. experts.cpp's ``kFewRows``."""

_library = torch.library.Library("modes_fx", "FRAGMENT")


def _define(file: str, schema: str, fake: Callable[..., Any]) -> None:
    """Define an operation that the library of a source computes; it is loaded when it is first called."""
    _library.define(schema)
    name = schema.partition("(")[0]

    def load_first(*args: Any) -> Any:
        if any(isinstance(value, Tensor) and value.device.type != "cpu" for value in args):
            raise NotImplementedError(f"modes_fx::{name} runs on a CPU.")
        library.load(file)  # on a CPU, its kernels take precedence over this one
        return getattr(torch.ops.modes_fx, name).default(*args)

    _library.impl(name, load_first, "CompositeExplicitAutograd")
    torch.library.register_fake(f"modes_fx::{name}", fake)


def _sort_pairs(keep: Tensor, expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size(min=0)
    ends = torch.empty(num_experts + 1, dtype=torch.int64, device=keep.device)
    return torch.empty(rows, dtype=torch.int64, device=keep.device), ends


def _linear(x: Tensor, pairs: Tensor | None, top_k: int, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty((x if pairs is None else pairs).shape[0], _columns(weight))


def _linear_combine(
    x: Tensor, pairs: Tensor, top_k: int, row_weights: Tensor, weight: Tensor, offsets: Tensor, tokens: int
) -> Tensor:
    return x.new_empty(tokens, _columns(weight), dtype=torch.float32)


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _columns(weight: Tensor) -> int:
    return weight.shape[1] if weight.dim() == 3 else weight.shape[1] * weight.shape[3]


_define("experts.cpp", "sort_pairs(Tensor keep, Tensor expert_ids, int num_experts) -> (Tensor, Tensor)", _sort_pairs)
_define("experts.cpp", "dense(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _dense)
for _file, _suffix, _weight in (("experts.cpp", "", "weight"), ("packed.cpp", "_packed", "blocks")):
    _rows = f"Tensor {_weight}, Tensor offsets"
    _define(_file, f"linear{_suffix}(Tensor x, Tensor? pairs, int top_k, {_rows}) -> Tensor", _linear)
    _given = f"Tensor x, Tensor pairs, int top_k, Tensor row_weights, {_rows}, SymInt tokens"
    _define(_file, f"linear_combine{_suffix}({_given}) -> Tensor", _linear_combine)

PACKED = {
    torch.ops.modes_fx.linear.default: torch.ops.modes_fx.linear_packed.default,
    torch.ops.modes_fx.linear_combine.default: torch.ops.modes_fx.linear_combine_packed.default,
}
"""What takes packed blocks in the place of a weight."""
