"""The Triton programs against float64: on an NVIDIA GPU, or in Triton's interpreter without one."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from modes_fx.kernels.cuda import ops
from modes_fx.kernels.cuda.sizes import PairSize, Size, flattened, pair_sizes_to_try, size_of, sizes_to_try
from tests.kernels.cuda.choosing import in_the_interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPILOGUES = {
    "": ("", lambda a, b, bias_a, bias_b: a),
    "bias": ("return a + bias_a", lambda a, b, bias_a, bias_b: a + bias_a),
    "silu": ("return a * tl.sigmoid(a) * b", lambda a, b, bias_a, bias_b: F.silu(a) * b),
    "biased": ("c = b + bias_b\nreturn (a + bias_a) * c", lambda a, b, bias_a, bias_b: (a + bias_a) * (b + bias_b)),
}
"""What follows the first product: in Triton, and as torch computes it."""


class Case:
    """Experts with random weights, of which some lie transposed, and routing of which some is dropped."""

    def __init__(
        self, tokens: int, hidden: int, inner: int, experts: int, top_k: int, kept: float, epilogue: str, parts: str
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE)

        self.num_experts = experts
        self.parts = parts if epilogue in ("silu", "biased") else ""
        (self.epilogue, self.follow), columns = EPILOGUES[epilogue], inner * (2 if self.parts else 1)
        self.x = randn(tokens, hidden)
        self.first = randn(experts, columns, hidden) * hidden**-0.5
        self.biases = (randn(experts, columns), randn(experts, hidden)) if epilogue.startswith("bias") else (None, None)
        self.last = "return a + bias_a" if epilogue.startswith("bias") else ""
        self.second = (randn(experts, inner, hidden) * inner**-0.5).transpose(1, 2)
        self.top_k = min(top_k, experts)
        self.ids = torch.rand(tokens, experts, generator=generator).topk(self.top_k).indices.to(DEVICE)
        self.keep = torch.rand(tokens, self.top_k, generator=generator).to(DEVICE) < kept
        self.weights = torch.rand(tokens, self.top_k, generator=generator).to(DEVICE)
        self.experts = torch.where(self.keep, self.ids, experts).reshape(-1).int()

    def wanted(self) -> Tensor:
        total = torch.zeros_like(self.x, dtype=torch.float64)
        for token, rank in self.keep.nonzero().tolist():
            expert = self.ids[token, rank]
            y = self.first[expert].double() @ self.x[token].double()
            bias, last = (torch.zeros_like(y) if biases is None else biases[expert].double() for biases in self.biases)
            y = self.follow(*self.split(y), *self.split(bias))
            z = self.second[expert].double() @ y + (last if self.last else 0)
            total[token] += self.weights[token, rank].double() * z
        return total

    def split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.parts == "interleaved":
            return y[::2], y[1::2]
        return y.chunk(2) if self.parts else (y, y)

    def by_pairs(self, *sizes: PairSize) -> Tensor:
        flat = flattened(sizes or (PairSize(8, 512, 4),))
        first, last = self.biases
        y = ops.pair_linear(self.x, self.experts, self.first, first, self.top_k, self.parts, self.epilogue, flat)
        return ops.pair_combine(y, self.experts, self.weights.reshape(-1), self.second, last, self.top_k, self.last, flat)

    def by_rows(self, *sizes: Size) -> Tensor:
        key, order = torch.sort(self.experts, stable=True)
        index = torch.arange(self.num_experts, dtype=torch.int32, device=DEVICE)
        blocks = ops.cut_rows(torch.searchsorted(key, index, right=True, out_int32=True), order, sizes[0].rows)
        first, last = self.biases
        y = ops.block_linear(
            self.x, order, blocks, self.first, first, self.top_k, False, self.parts, self.epilogue, flattened(sizes)
        )
        z = ops.block_linear(y, order, blocks, self.second, last, 0, True, "", self.last, flattened(sizes))
        return ops.pair_sum(z, self.experts, self.weights.reshape(-1), self.top_k, self.num_experts)

    def check(self, actual: Tensor) -> None:
        wanted = self.wanted()
        assert actual.isfinite().all()
        assert (actual - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max().item())


def cases(most_tokens: int) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        tokens=st.integers(1, most_tokens),
        hidden=st.integers(1, 70),
        inner=st.integers(1, 40),
        experts=st.integers(1, 9),
        top_k=st.integers(1, 4),
        kept=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        epilogue=st.sampled_from(list(EPILOGUES)),
        parts=st.sampled_from(["halves", "interleaved"]),
    )


ONE_EXPERT_FOR_ALL = Case(40, 33, 17, 1, 1, 1.0, "silu", "halves")
NOTHING_KEPT = Case(5, 64, 32, 8, 2, 0.0, "biased", "interleaved")


@given(cases(8))
@settings(max_examples=25)
@example(NOTHING_KEPT)
def test_kept_pairs_one_by_one(case: Case) -> None:
    case.check(case.by_pairs())


@given(cases(40))
@settings(max_examples=25)
@example(ONE_EXPERT_FOR_ALL)
@example(NOTHING_KEPT)
def test_kept_pairs_sorted_by_expert(case: Case) -> None:
    case.check(case.by_rows(Size(rows=16, columns=32, inner=32, warps=4, stages=2)))


CAPABILITIES = pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0)])
ROWS = pytest.mark.parametrize("rows", [1, 40, 100, 1000])


@ROWS
@CAPABILITIES
def test_every_size_computes_the_same(capability: tuple[int, int], rows: int) -> None:
    case = Case(150, 130, 70, 3, 2, 0.6, "silu", "halves")
    case.check(case.by_rows(size_of(capability, rows)))


def test_every_size_that_is_tried_computes_the_same() -> None:
    case = Case(6, 130, 40, 3, 2, 0.6, "biased", "interleaved")
    for size in sizes_to_try((9, 0), 1, 2):
        case.check(case.by_rows(size))
    for pair_size in pair_sizes_to_try(True, 2):
        case.check(case.by_pairs(pair_size))


def test_of_several_sizes_one_is_taken() -> None:
    case = Case(4, 70, 40, 3, 2, 0.6, "silu", "halves")
    times = itertools.count()
    with in_the_interpreter(lambda call: float(next(times) % 7)):
        case.check(case.by_rows(*sizes_to_try((9, 0), 1, 2)))
        case.check(case.by_rows(*sizes_to_try((9, 0), 1, 2)))  # chosen
        case.check(case.by_pairs(*pair_sizes_to_try(True, 2)))


@ROWS
@CAPABILITIES
def test_sizes_to_try_begin_with_the_tables_and_share_its_rows(capability: tuple[int, int], rows: int) -> None:
    tried = sizes_to_try(capability, rows, 2)
    assert tried[0] == size_of(capability, rows)
    assert {size.rows for size in tried} == {tried[0].rows}
    assert len(set(tried)) == len(tried) >= 3


def test_rows_of_dropped_pairs_are_neither_written_nor_read() -> None:
    case = Case(12, 16, 16, 4, 2, 0.5, "", "")
    y = torch.full((24, 16), torch.nan, device=DEVICE)
    y[case.keep.reshape(-1)] = 1.0
    total = ops.pair_sum(y, case.experts, None, 2, 4)
    assert total[:, 0].equal(case.keep.sum(1).float())
    assert ops.pair_combine(y, case.experts, case.weights.reshape(-1), case.second, None, 2, "", [8, 512, 4]).isfinite().all()


def test_no_tokens_are_no_work() -> None:
    case = Case(1, 16, 16, 4, 2, 1.0, "silu", "halves")
    case.x, case.experts, case.weights = case.x[:0], case.experts[:0], case.weights[:0]
    assert case.by_pairs().shape == (0, 16)
    assert case.by_rows(size_of((9, 0), 0)).shape == (0, 16)


@pytest.mark.parametrize(
    ("capability", "like"), [((8, 9), (8, 6)), ((10, 0), (9, 0)), ((12, 1), (12, 0)), ((8, 7), (8, 0)), ((7, 5), (8, 0))]
)
def test_a_card_takes_the_sizes_of_the_nearest(capability: tuple[int, int], like: tuple[int, int]) -> None:
    assert [size_of(capability, rows) for rows in (1, 30, 100, 999)] == [size_of(like, rows) for rows in (1, 30, 100, 999)]
