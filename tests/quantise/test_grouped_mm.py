"""The grouped products with quantised weights: against dense float64, for no row, few and many, and what they leave unread."""

import math

import pytest
import torch
from torch import Tensor

from modes_fx.quantise.grouped_mm import grouped_mm_int4, grouped_mm_int8

EXPERTS, INPUTS, OUTPUTS = 4, 64, 32
DTYPES = [torch.float32, torch.bfloat16]
COUNTS = [(0, 0, 0, 0), (1, 0, 5, 2), (0, 40, 0, 3), (20, 17, 16, 15)]


def offsets_of(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def dense(rows: Tensor, weight_EIO: Tensor, counts: tuple[int, ...]) -> Tensor:
    parts = zip(rows.double().split(list(counts)), weight_EIO.double(), strict=True)
    return torch.cat([part @ weight for part, weight in parts])


def assert_close(actual: Tensor, wanted: Tensor) -> None:
    assert actual.shape == wanted.shape
    if wanted.numel():
        slack = 1e-5 if actual.dtype is torch.float32 else 0.02
        assert (actual.double() - wanted).abs().max() <= slack * wanted.abs().max()


def int8_weight(groups: int, *, zeros: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return what is stored, [E, O, I] seen as [E, I, O], and the float weight that it stands for."""
    stored = torch.randint(-128, 128, (EXPERTS, OUTPUTS, INPUTS), dtype=torch.int8)
    scale = torch.rand(EXPERTS, OUTPUTS, groups) * 0.01 + 0.01
    zero = torch.randint(-9, 9, scale.shape, dtype=torch.int8) if zeros else None
    shifted = stored.double() - (0 if zero is None else zero.repeat_interleave(INPUTS // groups, 2).double())
    meant = shifted * scale.double().repeat_interleave(INPUTS // groups, 2)
    return stored.mT, scale.mT, None if zero is None else zero.mT, meant.mT


def int4_weight(dtype: torch.dtype, group_size: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed weights, their scales and zeros, and what they stand for, [E, I, O]."""
    values = torch.randint(0, 16, (EXPERTS, OUTPUTS, INPUTS), dtype=torch.int32)
    packed = torch.stack([torch.ops.aten._convert_weight_to_int4pack_for_cpu(matrix, 1) for matrix in values])
    scale_and_zero = (torch.rand(EXPERTS, INPUTS // group_size, OUTPUTS, 2) * 0.1 + 0.1).to(dtype)
    scale, zero = (part.double().mT.repeat_interleave(group_size, 2) for part in scale_and_zero.unbind(-1))
    return packed, scale_and_zero, ((values - 8).double() * scale + zero).mT


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "zeros"), [(1, False), (2, False), (2, True)])
def test_int8(groups: int, zeros: bool, dtype: torch.dtype, counts: tuple[int, ...]) -> None:
    weight, scale, zero, meant = int8_weight(groups, zeros=zeros)
    rows = torch.randn(sum(counts), INPUTS).to(dtype)
    assert_close(grouped_mm_int8(rows, weight, scale, zero, offsets_of(counts)), dense(rows, meant, counts))


def test_int8_with_one_scale_for_all() -> None:
    weight, _, _, _ = int8_weight(1, zeros=False)
    rows = torch.randn(6, INPUTS)
    actual = grouped_mm_int8(rows, weight, torch.full((1, 1, 1), 0.02), None, offsets_of((1, 2, 3, 0)))
    assert_close(actual, dense(rows, weight.double() * 0.02, (1, 2, 3, 0)))


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_int4(dtype: torch.dtype, counts: tuple[int, ...]) -> None:
    packed, scale_and_zero, meant = int4_weight(dtype)
    rows = torch.randn(sum(counts), INPUTS).to(dtype)
    assert_close(grouped_mm_int4(rows, packed, scale_and_zero, 32, offsets_of(counts)), dense(rows, meant, counts))


def test_an_expert_without_rows_is_not_read_and_rows_past_the_last_offset_are_0() -> None:
    weight, scale, _, meant = int8_weight(1, zeros=False)
    packed, scale_and_zero, meant_int4 = int4_weight(torch.float32)
    scale[1], scale_and_zero[1] = math.nan, math.nan
    rows, counts = torch.randn(7, INPUTS), (2, 0, 1, 2)
    for actual, wanted in (
        (grouped_mm_int8(rows, weight, scale, None, offsets_of(counts)), meant),
        (grouped_mm_int4(rows, packed, scale_and_zero, 32, offsets_of(counts)), meant_int4),
    ):
        assert_close(actual[:5], dense(rows[:5], wanted, counts))
        assert not actual[5:].any()


@pytest.mark.parametrize("counts", COUNTS[:2])
def test_the_operators_are_what_they_declare(counts: tuple[int, ...]) -> None:
    rows = torch.randn(sum(counts), INPUTS)
    weight, scale, zero, _ = int8_weight(2, zeros=True)
    packed, scale_and_zero, _ = int4_weight(torch.float32)
    torch.library.opcheck(grouped_mm_int8, (rows, weight, scale, zero, offsets_of(counts)))
    torch.library.opcheck(grouped_mm_int4, (rows, packed, scale_and_zero, 32, offsets_of(counts)))
