"""Grouped products with quantised weights, as operators: one expert's weight is opened at a time, and only if it has rows.

Rows are sorted by expert; expert e has the rows ``offsets[e - 1]`` to ``offsets[e]``. Rows past the last offset give 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

# One row reads the int8 weight once with _weight_int8pack_mm, where a conversion to bfloat16 reads and writes it first; many
# rows share the conversion.
_FEW_ROWS = 16


@torch.library.custom_op("modes_fx::grouped_mm_int8", mutates_args=())
def grouped_mm_int8(rows: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, offsets: Tensor) -> Tensor:
    """Multiply by int8 weights, ``(weight - zero_point) * scale`` block by block.

    Args:
        rows: [S, I], float.
        weight: int8 [E, I, O], in any memory order.
        scale: [E, I / block, O / block], or 1 in all places.
        zero_point: As ``scale``, or None. As in torchao, it has no part where one scale serves a whole column.
        offsets: int32 [E].

    Returns:
        [S, O], in the rows' dtype.
    """
    if scale.shape[1] > 1:
        return _by_expert(rows, offsets, weight.shape[2], partial(_open_and_multiply, weight, scale, zero_point))
    scale_EO = scale.to(rows.dtype).expand(weight.shape[0], 1, weight.shape[2]).contiguous().squeeze(1)
    weight_EOI = weight.mT
    reads_bytes = rows.dtype is torch.bfloat16 and weight_EOI.is_contiguous()

    def multiply(expert: int, mine: Tensor) -> Tensor:
        if reads_bytes and len(mine) <= _FEW_ROWS:
            product: Tensor = torch.ops.aten._weight_int8pack_mm(mine, weight_EOI[expert], scale_EO[expert])
            return product
        return torch.mm(mine, weight[expert].to(mine.dtype)).mul_(scale_EO[expert])

    return _by_expert(rows, offsets, weight.shape[2], multiply)


@torch.library.custom_op("modes_fx::grouped_mm_int4", mutates_args=())
def grouped_mm_int4(rows: Tensor, packed: Tensor, scale_and_zero: Tensor, group_size: int, offsets: Tensor) -> Tensor:
    """Multiply by int4 weights as ``aten._weight_int4pack_mm_for_cpu`` takes them.

    Args:
        rows: [S, I], float.
        packed: uint8 [E, O, I / 2].
        scale_and_zero: [E, I / group_size, O, 2], in the rows' dtype.
        group_size: Weights of an output that share a scale.
        offsets: int32 [E].

    Returns:
        [S, O], in the rows' dtype.
    """

    def multiply(expert: int, mine: Tensor) -> Tensor:
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(mine, packed[expert], group_size, scale_and_zero[expert])
        return product

    return _by_expert(rows, offsets, packed.shape[1], multiply)


@grouped_mm_int8.register_fake
def _(rows: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


@grouped_mm_int4.register_fake
def _(rows: Tensor, packed: Tensor, scale_and_zero: Tensor, group_size: int, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], packed.shape[1])


def _by_expert(rows: Tensor, offsets: Tensor, width: int, multiply: Callable[[int, Tensor], Tensor]) -> Tensor:
    rows = rows.contiguous()
    result = rows.new_empty(rows.shape[0], width)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            result[start:end] = multiply(expert, rows[start:end])
        start = end
    result[start:] = 0
    return result


def _open_and_multiply(weight: Tensor, scale: Tensor, zero_point: Tensor | None, expert: int, mine: Tensor) -> Tensor:
    """Multiply by one expert's weight as floats, [I, O]: the scale changes along what is summed over."""
    blocks = weight[expert].unflatten(0, (scale.shape[1], -1)).unflatten(2, (scale.shape[2], -1))  # [I/b, b, O/b, b]
    shifted = blocks if zero_point is None else blocks.to(scale.dtype) - zero_point[expert][:, None, :, None]
    opened: Tensor = (shifted * scale[expert][:, None, :, None]).reshape(weight.shape[1:])
    return mine @ opened.to(mine.dtype)
