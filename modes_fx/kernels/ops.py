"""The kernels as torch operations, which FX passes insert and Inductor calls.

Shapes: T tokens, K experts a token, S = T * K pairs, R kept pairs (rows, sorted by expert), E experts, D inner, N outer size.
A *pair* is token * K + rank. ``offsets`` int64 [E + 1]: the rows of expert e are ``offsets[e]`` to ``offsets[e + 1]``. They run
on a CPU and have no gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modes_fx.kernels.library import DTYPES, load, load_packed

_library = torch.library.Library("modes_fx", "FRAGMENT")
_library.define("sort_pairs(Tensor keep, Tensor expert_ids, int num_experts) -> (Tensor, Tensor)")
for _suffix, _weight in (("", "weight"), ("_packed", "blocks")):
    _library.define(f"linear{_suffix}(Tensor x, Tensor? pairs, int top_k, Tensor {_weight}, Tensor offsets) -> Tensor")
    _library.define(
        f"linear_combine{_suffix}(Tensor x, Tensor pairs, int top_k, Tensor row_weights, Tensor {_weight}, Tensor offsets,"
        " SymInt tokens) -> Tensor"
    )


def sort_pairs(keep: Tensor, expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort the kept pairs by expert, and within an expert as they come.

    Args:
        keep: bool [S].
        expert_ids: Integers [S].
        num_experts: E.

    Returns:
        Pairs, int64 [R], and offsets.

    Raises:
        IndexError: The expert of a kept pair is not in [0, E).
    """
    keep, expert_ids = keep.contiguous(), expert_ids.to(torch.int64).contiguous()
    total = expert_ids.numel()
    pairs = torch.empty(total, dtype=torch.int64, device="cpu")
    offsets = torch.empty(num_experts + 1, dtype=torch.int64, device="cpu")
    rows = load().modes_fx_sort_pairs(
        keep.data_ptr(), expert_ids.data_ptr(), total, num_experts, pairs.data_ptr(), offsets.data_ptr()
    )
    if rows < 0:
        raise IndexError(f"A router chose an expert outside of 0 to {num_experts - 1}.")
    return pairs[:rows], offsets


def linear(x: Tensor, pairs: Tensor | None, top_k: int, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each row by its expert's weight.

    Args:
        x: float32 or bfloat16 [T, D], of which row ``pairs[r] // top_k`` is taken; or [R, D] without ``pairs``.
        pairs: int64 [R], or None.
        top_k: K.
        weight: Of x's dtype, [E, N, D], contiguous along D.
        offsets: See above.

    Returns:
        [R, N], of x's dtype.
    """
    experts, columns, inner = weight.shape
    rows = x if pairs is None else pairs
    out = x.new_empty(rows.shape[0], columns)
    if out.numel() and _suits_matrix_units(x, rows.shape[0], experts):
        return _grouped_mm(x if pairs is None else x[pairs // top_k], weight, offsets)
    if out.numel():
        x = _along_rows(x)
        getattr(load(), f"modes_fx_linear_{DTYPES[x.dtype]}")(
            x.data_ptr(), x.stride(0), _pointer(pairs), top_k, weight.data_ptr(), weight.stride(0), weight.stride(1),
            offsets.data_ptr(), experts, columns, inner, out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return out


def linear_combine(
    x: Tensor, pairs: Tensor, top_k: int, row_weights: Tensor, weight: Tensor, offsets: Tensor, tokens: int
) -> Tensor:
    """Multiply each row by its expert's weight and by its routing weight, and add up the rows of each token.

    Args:
        x: float32 or bfloat16 [R, D].
        pairs: int64 [R].
        top_k: K.
        row_weights: float32 [R].
        weight: Of x's dtype, [E, N, D], contiguous along D.
        offsets: See above.
        tokens: T.

    Returns:
        float32 [T, N].
    """
    experts, columns, inner = weight.shape
    out = torch.zeros(tokens, columns, dtype=torch.float32, device="cpu")
    if x.numel() and _suits_matrix_units(x, x.shape[0], experts):
        rows = _grouped_mm(x, weight, offsets).float() * row_weights.unsqueeze(1)
        return out.index_add_(0, pairs // top_k, rows)
    if x.numel():
        x, row_weights = _along_rows(x), row_weights.contiguous()
        getattr(load(), f"modes_fx_combine_{DTYPES[x.dtype]}")(
            x.data_ptr(), x.stride(0), pairs.data_ptr(), top_k, row_weights.data_ptr(), weight.data_ptr(), weight.stride(0),
            weight.stride(1), offsets.data_ptr(), experts, columns, inner, out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return out


ROWS_FOR_MATRIX_UNITS = 16
"""Rows an expert, on average, from which oneDNN's GEMM on a CPU with AMX is left to work on weights as they lie."""


def _suits_matrix_units(x: Tensor, rows: int, experts: int) -> bool:
    # AMX wants weights packed, which our kernel does not do: where arithmetic counts, oneDNN packs them as it goes.
    many = x.dtype is torch.bfloat16 and rows >= ROWS_FOR_MATRIX_UNITS * experts
    return many and torch.cpu._is_amx_tile_supported()


def _grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return torch._grouped_mm(x, weight.mT, offs=offsets[1:].to(torch.int32))


def linear_packed(x: Tensor, pairs: Tensor | None, top_k: int, blocks: Tensor, offsets: Tensor) -> Tensor:
    """As ``linear``, with the blocks of a ``packed.PackedWeight``."""
    experts, columns, inner = _packed_shape(blocks)
    out = x.new_empty((x if pairs is None else pairs).shape[0], columns)
    if out.numel():
        x = _along_rows(x)
        load_packed().modes_fx_linear_packed(
            x.data_ptr(), x.stride(0), _pointer(pairs), top_k, blocks.data_ptr(),
            offsets.data_ptr(), experts, columns, inner, out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return out


def linear_combine_packed(
    x: Tensor, pairs: Tensor, top_k: int, row_weights: Tensor, blocks: Tensor, offsets: Tensor, tokens: int
) -> Tensor:
    """As ``linear_combine``, with the blocks of a ``packed.PackedWeight``."""
    experts, columns, inner = _packed_shape(blocks)
    out = torch.zeros(tokens, columns, dtype=torch.float32, device="cpu")
    if x.numel():
        x, row_weights = _along_rows(x), row_weights.contiguous()
        load_packed().modes_fx_combine_packed(
            x.data_ptr(), x.stride(0), pairs.data_ptr(), top_k, row_weights.data_ptr(), blocks.data_ptr(), offsets.data_ptr(),
            experts, columns, inner, out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return out


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _packed_shape(blocks: Tensor) -> tuple[int, int, int]:
    experts, tiles, halves, columns, both = blocks.shape
    return experts, tiles * columns, halves * both


def _along_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _sort_pairs(keep: Tensor, expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    rows = torch.library.get_ctx().new_dynamic_size(min=0)
    return keep.new_empty(rows, dtype=torch.int64), keep.new_empty(num_experts + 1, dtype=torch.int64)


def _linear(x: Tensor, pairs: Tensor | None, top_k: int, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty((x if pairs is None else pairs).shape[0], weight.shape[1])


def _linear_combine(
    x: Tensor, pairs: Tensor, top_k: int, row_weights: Tensor, weight: Tensor, offsets: Tensor, tokens: int
) -> Tensor:
    return x.new_empty(tokens, weight.shape[1], dtype=torch.float32)


def _linear_packed(x: Tensor, pairs: Tensor | None, top_k: int, blocks: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty((x if pairs is None else pairs).shape[0], _packed_shape(blocks)[1])


def _linear_combine_packed(
    x: Tensor, pairs: Tensor, top_k: int, row_weights: Tensor, blocks: Tensor, offsets: Tensor, tokens: int
) -> Tensor:
    return x.new_empty(tokens, _packed_shape(blocks)[1], dtype=torch.float32)


for _operation, _fake in (
    (sort_pairs, _sort_pairs),
    (linear, _linear),
    (linear_combine, _linear_combine),
    (linear_packed, _linear_packed),
    (linear_combine_packed, _linear_combine_packed),
):
    _library.impl(_operation.__name__, _operation, "CPU")
    torch.library.register_fake(f"modes_fx::{_operation.__name__}", _fake)

PACKED = {
    torch.ops.modes_fx.linear.default: torch.ops.modes_fx.linear_packed.default,
    torch.ops.modes_fx.linear_combine.default: torch.ops.modes_fx.linear_combine_packed.default,
}
"""What takes packed blocks in the place of a weight."""
