"""The kernels against float64, at sizes that no vector width divides; and as torch operations."""

import pytest
import torch
from torch import Tensor

import modes_fx  # noqa: F401 - it defines them
from modes_fx.kernels.cpu.ops import FEW_ROWS

ops = torch.ops.modes_fx
DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(5, 2, 4, 16, 12), (33, 4, 6, 70, 37), (300, 2, 3, 40, 9), (1, 3, 5, 64, 4), (0, 2, 3, 8, 8), (400, 1, 1, 33, 5)]
"""T, K, E, D, N; the last with more rows of one expert than are worked on at once."""

SIZES += [(9, 2, 4, 32, 16), (40, 1, 3, 64, 48), (300, 1, 1, 96, 80)]
"""And such as matrix units take, where the processor has them: one tile, remainders of two, more rows than at once."""


def routing(tokens: int, top_k: int, experts: int, share: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k].reshape(-1)
    keep = torch.rand(tokens * top_k, generator=generator) < share
    return ids, *ops.sort_pairs(keep, ids, experts)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_close(actual: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == wanted.shape
    largest = float(wanted.abs().max()) if wanted.numel() else 1.0
    assert ((actual.double() - wanted).abs() <= (1e-6 if dtype is torch.float32 else 2**-8) * largest).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_pairs_are_sorted_by_expert_and_stay_in_order_within_one(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ids, keep = torch.randint(7, (60,), generator=generator), torch.rand(60, generator=generator) < share
    pairs, offsets = ops.sort_pairs(keep, ids, 7)
    kept = keep.nonzero().squeeze(1)
    assert pairs.equal(kept[ids[kept].sort(stable=True).indices])
    assert offsets[0] == 0
    assert offsets.diff().equal(torch.bincount(ids[kept], minlength=7))


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_experts_of_kept_pairs_have_to_exist(kind: torch.dtype) -> None:
    ids = torch.tensor([0, 7, 1, -1], dtype=kind)
    with pytest.raises(IndexError, match="outside of 0 to 1"):
        ops.sort_pairs(torch.tensor([True, True, True, False]), ids, 2)
    with pytest.raises(IndexError, match="outside of 0 to 1"):
        ops.sort_pairs(torch.tensor([True, False, True, True]), ids, 2)
    pairs, offsets = ops.sort_pairs(torch.tensor([True, False, True, False]), ids, 2)
    assert (pairs.tolist(), offsets.tolist()) == ([0, 2], [0, 1, 2])


def test_results_are_float32_on_the_cpu_whatever_the_default() -> None:
    pairs, offsets = ops.sort_pairs(torch.tensor([True]), torch.tensor([0]), 1)
    x, weight = torch.ones(1, 4), torch.ones(1, 4, 4)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            out = ops.linear_combine(x, pairs, 1, torch.ones(1, dtype=torch.float32, device="cpu"), weight, offsets, 1)
            again, _ = ops.sort_pairs(torch.tensor([True], device="cpu"), torch.tensor([0], device="cpu"), 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (out.dtype, out.tolist(), again.tolist()) == (torch.float32, [[4.0] * 4], [0])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_are_multiplied_by_their_experts_weights(size: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, top_k, experts, inner, outer = size
    ids, pairs, offsets = routing(tokens, top_k, experts)
    x, weight = randn(tokens, inner, dtype=dtype), randn(experts, outer, inner, dtype=dtype)
    gathered = ops.linear(x, pairs, top_k, weight, offsets)
    given = ops.linear(x[pairs // top_k], None, top_k, weight, offsets)
    wanted = torch.einsum("rd,rnd->rn", x[pairs // top_k].double(), weight[ids[pairs]].double())
    assert_close(gathered, wanted, dtype)
    assert given.equal(gathered)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_weighted_rows_are_added_up_in_float32(size: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, top_k, experts, inner, outer = size
    ids, pairs, offsets = routing(tokens, top_k, experts)
    x, weight, weights = randn(len(pairs), inner, dtype=dtype), randn(experts, outer, inner, dtype=dtype), randn(len(pairs))
    out = ops.linear_combine(x, pairs, top_k, weights, weight, offsets, tokens)
    rows = torch.einsum("rd,rnd->rn", x.double(), weight[ids[pairs]].double()) * weights.double().unsqueeze(1)
    assert out.dtype is torch.float32
    assert_close(out, torch.zeros(tokens, outer, dtype=torch.float64).index_add(0, pairs // top_k, rows), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "outer"), [(70, 37), (64, 48)])
def test_a_row_does_not_know_how_many_share_its_expert(inner: int, outer: int, dtype: torch.dtype) -> None:
    x, weight = randn(200, inner, dtype=dtype), randn(1, outer, inner, dtype=dtype)
    together = ops.linear(x, None, 1, weight, torch.tensor([0, 200]))
    for first, count in ((0, 1), (3, 2), (7, 6), (20, 7), (50, 100)):
        some = ops.linear(x[first : first + count], None, 1, weight, torch.tensor([0, count]))
        assert some.equal(together[first : first + count])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "outer"), [(40, 10), (64, 16)])
def test_inputs_with_other_strides_are_read_as_they_are(inner: int, outer: int, dtype: torch.dtype) -> None:
    _, pairs, offsets = routing(6, 2, 3)
    x, weight = randn(6, inner, dtype=dtype), randn(3, outer, inner, dtype=dtype)
    wanted = ops.linear(x, pairs, 2, weight, offsets)
    wide, wider = randn(6, 99, dtype=dtype), randn(3, 2 * outer, 77, dtype=dtype)
    wide[:, 5 : 5 + inner], wider[:, ::2, 3 : 3 + inner] = x, weight
    assert ops.linear(wide[:, 5 : 5 + inner], pairs, 2, wider[:, ::2, 3 : 3 + inner], offsets).equal(wanted)
    assert ops.linear(x.t().contiguous().t(), pairs, 2, weight, offsets).equal(wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_without_rows_are_not_read(dtype: torch.dtype) -> None:
    x, weight = randn(2, 16, dtype=dtype), randn(3, 8, 16, dtype=dtype)
    weight[1] = torch.nan
    pairs, offsets = ops.sort_pairs(torch.tensor([True, False, True, True]), torch.tensor([0, 1, 2, 0]), 3)
    rows = ops.linear(x, pairs, 2, weight, offsets)
    assert rows.isfinite().all()
    assert ops.linear_combine(rows, pairs, 2, torch.ones(3), weight.mT.contiguous(), offsets, 2).isfinite().all()


def test_inputs_that_do_not_fit_are_refused() -> None:
    _, pairs, offsets = routing(6, 2, 3)
    x, weight = randn(6, 40), randn(3, 10, 40)
    for given, message in (
        ((x[:, 1:], pairs, 2, weight, offsets), "do not fit"),
        ((x, pairs, 2, weight.mT.contiguous().mT, offsets), "does not lie along its last dimension"),
        ((x, pairs, 2, weight, offsets[1:]), r"offsets are int64 \[E \+ 1\]"),
        ((x, pairs[1:], 2, weight, offsets), "of another number of rows"),
        ((x.half(), pairs, 2, weight.half(), offsets), "float32 and bfloat16, not in Half"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.linear(*given)
    with pytest.raises(RuntimeError, match=r"bias is \[N\]"):
        ops.dense(x, weight[0], randn(9))
    for other, message in (
        (weight[0, :, 1:], "do not fit"),
        (weight[0].mT.contiguous().mT, "does not lie along its last dimension"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.dense(x, other, None)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (1, 1, 70), (2, 3, 40), (FEW_ROWS, 33), (FEW_ROWS + 1, 33), (0, 8), (4,)], ids=str)
def test_other_layers_are_multiplied_too(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias = (
        randn(*shape, dtype=dtype),
        randn(13, 2 * shape[-1], dtype=dtype)[:, 1 : 1 + shape[-1]],
        randn(13, dtype=dtype),
    )
    wanted = x.double() @ weight.double().T
    assert_close(ops.dense(x, weight, None), wanted, dtype)
    assert_close(ops.dense(x, weight, bias), wanted + bias, dtype)
    wide = randn(*shape[:-1], shape[-1] + 5, dtype=dtype)[..., 2:-3]
    assert ops.dense(wide, weight, bias).equal(ops.dense(wide.contiguous(), weight, bias))


@pytest.mark.parametrize("special", [float("nan"), float("inf"), 1e38])
def test_what_is_not_finite_stays_so_in_bfloat16(special: float) -> None:
    x = torch.tensor([[special]], dtype=torch.bfloat16)
    weight = torch.full((1, 1, 1), 3.3e38 if special == 1e38 else 1.0, dtype=torch.bfloat16)
    pairs, offsets = ops.sort_pairs(torch.tensor([True]), torch.tensor([0]), 1)
    (result,) = ops.linear(x, pairs, 1, weight, offsets).flatten().tolist()
    assert str(result) == str(special if special != 1e38 else float("inf"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_they_are_well_behaved_operations(dtype: torch.dtype) -> None:
    ids, pairs, offsets = routing(5, 2, 4)
    x, up, down = randn(5, 16, dtype=dtype), randn(4, 12, 16, dtype=dtype), randn(4, 16, 12, dtype=dtype)
    rows = ops.linear(x, pairs, 2, up, offsets)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    keep = torch.arange(10) % 3 != 0
    for operation, given in (
        (torch.ops.modes_fx.sort_pairs, (keep, ids, 4)),
        (torch.ops.modes_fx.linear, (x, pairs, 2, up, offsets)),
        (torch.ops.modes_fx.linear, (rows, None, 2, down, offsets)),
        (torch.ops.modes_fx.linear_combine, (rows, pairs, 2, randn(len(pairs)), down, offsets, 5)),
        (torch.ops.modes_fx.dense, (x, up[0], up[0, :, 0].clone())),
        (torch.ops.modes_fx.dense, (x.view(1, 5, 16), up[0], None)),
    ):
        torch.library.opcheck(operation.default, given, test_utils=checks)
