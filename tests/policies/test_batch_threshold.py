"""Thresholds that know of the batch: who is computed because others have the expert read, and who never is."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modes_fx.errors import PlanError
from modes_fx.policies import RULES, decide
from modes_fx.policies.batch_threshold import slack_tables
from tests import oracle

FAST = settings(max_examples=60)
EXPERTS, TOP_K = 6, 3
CLASSES = torch.tensor([0.25, 0.5, math.inf])  # the bounds of text, vision, padding
SLACKS = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=EXPERTS, max_size=EXPERTS).map(torch.tensor)
Batch = tuple[Tensor, Tensor, Tensor]


@st.composite
def batches(draw: st.DrawFn, least: int = 0, most: int = 6) -> Batch:
    """Weights [T, K] in eighths, among them thresholds and what slacks make of them; experts; classes."""
    tokens = draw(st.integers(least, most))
    weights = [[draw(st.integers(0, 8)) / 8 for _ in range(TOP_K)] for _ in range(tokens)]
    ids = [draw(st.permutations(range(EXPERTS)))[:TOP_K] for _ in range(tokens)]
    classes = [draw(st.integers(0, 2)) for _ in range(tokens)]
    shape = (tokens, TOP_K)
    return (
        torch.tensor(weights).reshape(shape),
        torch.tensor(ids, dtype=torch.int64).reshape(shape),
        torch.tensor(classes).long(),
    )


def kept(batch: Batch, table: Tensor | None, bounds: Tensor = CLASSES) -> Tensor:
    """What is kept under slacks, or under plain thresholds without."""
    weights, ids, classes = batch
    rule = RULES["threshold" if table is None else "batch_threshold"].keep
    return decide(rule, ids, weights, classes, bounds, table)[0]


def experts_read(batch: Batch, keep: Tensor) -> set[int]:
    return set(batch[1][keep].tolist())


def alike(*slack: float) -> Tensor:
    return torch.tensor(slack).expand(EXPERTS)


@FAST
@given(batches(), SLACKS)
def test_it_decides_like_plain_loops_over_the_batch(batch: Batch, slacks: Tensor) -> None:
    weights, ids, classes = batch
    wanted = oracle.decide("batch_threshold", weights, ids, CLASSES[classes], slacks)
    assert kept(batch, slacks).equal(~wanted.isnan())


@FAST
@given(batches())
def test_no_slack_is_plain_thresholds(batch: Batch) -> None:
    assert kept(batch, alike(0.0)).equal(kept(batch, None))


@FAST
@given(batches(least=1, most=1), SLACKS)
def test_a_token_alone_is_under_plain_thresholds(batch: Batch, slacks: Tensor) -> None:
    assert kept(batch, slacks).equal(kept(batch, None))


@FAST
@given(batches(), SLACKS)
def test_slack_drops_no_pair_and_has_no_expert_more_read(batch: Batch, slacks: Tensor) -> None:
    plain, eased = kept(batch, None), kept(batch, slacks)
    assert not (plain & ~eased).any()
    assert experts_read(batch, plain) == experts_read(batch, eased)


@FAST
@given(batches(), SLACKS)
def test_padding_counts_for_nothing(batch: Batch, slacks: Tensor) -> None:
    real = batch[2] != 2
    keep = kept(batch, slacks)
    assert not keep[~real].any()
    without = tuple(each[real] for each in batch)
    assert keep[real].equal(kept(without, slacks))


def test_a_pair_below_its_threshold_is_computed_if_another_token_has_its_expert_read() -> None:
    weights, ids = torch.tensor([[0.5, 0.2, 0.1], [0.2, 0.2, 0.1]]), torch.tensor([[0, 1, 2], [0, 1, 2]])
    batch = weights, ids, torch.zeros(2, dtype=torch.int64)
    assert kept(batch, alike(0.25)).tolist() == [[True, False, False], [True, False, False]]
    assert kept(batch, torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0])).tolist() == [[True, False, False], [False] * 3]


def test_fewer_experts_are_read_at_an_equal_skip_ratio() -> None:
    torch.manual_seed(0)
    weights, ids = torch.rand(12, EXPERTS).softmax(1).topk(TOP_K)
    batch = weights, ids, torch.zeros(12, dtype=torch.int64)

    def with_pairs(table: Tensor, count: int) -> Tensor:
        """The least pairs kept that are at least so many, over all thresholds."""
        keeps = [kept(batch, table, torch.tensor([bound])) for bound in weights.flatten().tolist()]
        return min((keep for keep in keeps if keep.sum() >= count), key=lambda keep: int(keep.sum()))

    plain, eased = with_pairs(alike(0.0), 6), with_pairs(alike(0.2), 6)
    assert int(plain.sum()) == int(eased.sum()) == 6
    assert len(experts_read(batch, eased)) < len(experts_read(batch, plain))


def test_a_slack_is_a_share() -> None:
    assert slack_tables(2, 3, 0.5) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(PlanError, match=r"slack is in \[0, 1\]"):
            slack_tables(2, 3, wrong)
