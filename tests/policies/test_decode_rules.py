"""Rules that look at the whole of a decode step: which experts they read, against plain loops over pairs."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modes_fx.errors import PlanError
from modes_fx.policies import RULES, decide, rerouted
from modes_fx.policies.oea import open_tables
from modes_fx.policies.sere import primary_tables
from tests import oracle

FAST = settings(max_examples=60)
EXPERTS, TOP_K = 6, 3
PADDING = {"oea": 0.0, "sere": math.inf}
LEVELS = {"oea": (math.inf, 3.0, 2.0, 1.0), "sere": (0.0, 0.5, 1.0, 2.0, 4.0, 1e9)}  # each reads no more than the one before
Batch = tuple[Tensor, Tensor, Tensor]
Done = tuple[Tensor, Tensor, Tensor]
"""Kept pairs, their weights and experts."""


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Weights [T, K] in eighths, ties and zeros among them; experts; classes, of which 2 is padding."""
    tokens = draw(st.integers(0, 6))
    weights = [[draw(st.integers(0, 8)) / 8 for _ in range(TOP_K)] for _ in range(tokens)]
    ids = [draw(st.permutations(range(EXPERTS)))[:TOP_K] for _ in range(tokens)]
    classes = [draw(st.sampled_from([0, 2])) for _ in range(tokens)]
    shape = (tokens, TOP_K)
    ids_TK = torch.tensor(ids, dtype=torch.int64).reshape(shape)
    return torch.tensor(weights).reshape(shape), ids_TK, torch.tensor(classes).long()


similarities = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), min_size=EXPERTS**2, max_size=EXPERTS**2).map(
    lambda values: torch.tensor(values).reshape(EXPERTS, EXPERTS)
)
open_experts = st.lists(st.sampled_from([0.0, 1.0]), min_size=EXPERTS, max_size=EXPERTS).map(torch.tensor)


def table_of(name: str, draw: st.DataObject) -> Tensor:
    if name != "sere":
        return draw.draw(open_experts)
    return draw.draw(similarities).fill_diagonal_(draw.draw(st.integers(1, TOP_K)))


def done(name: str, batch: Batch, bound: float, table: Tensor) -> Done:
    """What a rule does to a batch whose tokens are under one bound."""
    made = RULES[name]
    weights, ids, classes = batch
    bounds = torch.tensor([bound, bound, made.skip_all])
    ids = rerouted(made, ids, weights, classes, bounds, table)
    keep, new = decide(made.keep, ids, weights, classes, bounds, table)
    return keep, weights if new is None else new, ids


def read(what: Done) -> set[int]:
    return set(what[2][what[0]].tolist())


@pytest.mark.parametrize("name", LEVELS)
@FAST
@given(data=st.data(), batch=batches())
def test_it_does_what_plain_loops_over_the_step_do(name: str, data: st.DataObject, batch: Batch) -> None:
    table, bound = table_of(name, data), data.draw(st.sampled_from(LEVELS[name]))
    bound_T = torch.where(batch[2] == 2, PADDING[name], bound)
    keep, weights, ids = done(name, batch, bound, table)
    wanted = oracle.reroute(*batch[:2], bound_T, table, int(table[0, 0])) if name == "sere" else batch[1]
    left = oracle.decide(name, batch[0], wanted, bound_T, table)
    assert ids.equal(wanted)
    assert keep.equal(~left.isnan())
    torch.testing.assert_close(weights.double()[keep], left[keep], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", LEVELS)
@FAST
@given(data=st.data(), batch=batches())
def test_a_higher_level_reads_no_more_experts(name: str, data: st.DataObject, batch: Batch) -> None:
    table = table_of(name, data)
    steps = [done(name, batch, level, table) for level in LEVELS[name]]
    keep, weights, ids = steps[0]  # nothing changes for real tokens
    real = batch[2] != 2
    assert keep.equal(real.unsqueeze(1).expand_as(keep))
    assert weights[keep].equal(batch[0][keep])
    assert ids[real].equal(batch[1][real])
    for less, more in pairwise(steps):
        assert read(more) <= read(less)


@pytest.mark.parametrize("name", LEVELS)
@FAST
@given(data=st.data(), batch=batches())
def test_a_token_keeps_its_largest_and_padding_counts_for_nothing(name: str, data: st.DataObject, batch: Batch) -> None:
    table, bound = table_of(name, data), data.draw(st.sampled_from(LEVELS[name]))
    real = batch[2] != 2
    keep, weights, ids = done(name, batch, bound, table)
    first = oracle.largest(batch[0], torch.ones(len(real))) & real.unsqueeze(1)
    assert not (first & ~keep).any()
    assert ids[first].equal(batch[1][first])
    assert not keep[~real].any()
    without = done(name, (batch[0][real], batch[1][real], batch[2][real]), bound, table)
    assert keep[real].equal(without[0])
    assert weights[real].equal(without[1])
    assert ids[real].equal(without[2])


def test_oea_takes_on_the_baseline_of_others_where_it_may() -> None:
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.375, 0.125]])
    batch = weights, torch.tensor([[0, 1, 2], [1, 3, 0]]), torch.zeros(2, dtype=torch.int64)
    keep, new, _ = done("oea", batch, 1.0, torch.tensor(open_tables(1, EXPERTS)[0]))
    assert keep.tolist() == [[True, True, False], [True, False, True]]
    torch.testing.assert_close(new, torch.tensor([[2 / 3, 1 / 3, 0.0], [0.8, 0.0, 0.2]]))
    alone, _, _ = done("oea", batch, 1.0, torch.zeros(EXPERTS))
    assert alone.tolist() == [[True, False, False], [True, False, False]]


def test_sere_moves_what_is_alike_and_reads_what_is_not() -> None:
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    batch = weights, torch.tensor([[0, 2, 3], [1, 2, 4]]), torch.zeros(2, dtype=torch.int64)
    table = torch.eye(EXPERTS)
    table[2, 1], table[2, 0], table[3, 0], table[4, 3] = 2.0, 1.5, 0.5, 9.0
    keep, new, ids = done("sere", batch, 1.0, table)
    assert keep.all()
    assert new.equal(weights)
    assert ids.tolist() == [[0, 1, 3], [1, 1, 4]]  # 3 is too unlike any primary expert, and what 4 is like is not primary
    assert done("sere", batch, 2.0, table)[2].tolist() == [[0, 1, 0], [1, 1, 4]]
    more = done("sere", batch, 1.0, torch.tensor(primary_tables([table.tolist()], 2)[0]))[2]
    assert more.tolist() == [[0, 2, 3], [1, 2, 4]]  # 2 is primary itself


def test_sere_has_a_primary_expert_at_least() -> None:
    assert primary_tables([[[1.0, 0.5], [0.5, 1.0]]], 3) == (((3.0, 0.5), (0.5, 3.0)),)
    with pytest.raises(PlanError, match="1 or more of them; got 0"):
        primary_tables([[[1.0]]], 0)


def test_they_are_about_decode_steps_alone() -> None:
    assert [name for name, rule in RULES.items() if rule.decode_only] == ["oea", "sere"]
    assert [name for name, rule in RULES.items() if rule.reroute] == ["sere"]


@pytest.mark.wide
def test_generated_code_moves_pairs_alike() -> None:
    rule, draw = RULES["sere"], torch.Generator().manual_seed(0)
    weights, ids = torch.rand(9, 32, generator=draw).softmax(1).topk(4)
    classes, bounds = torch.arange(9) % 3, torch.tensor([0.8, 2.0, math.inf])
    table = (torch.rand(32, 32, generator=draw) * 2).fill_diagonal_(2.0)

    def move(*given: Tensor) -> Tensor:
        return rerouted(rule, *given)

    for first in (9, 4):
        given = ids[:first], weights[:first], classes[:first], bounds, table
        moved = torch.compile(move, fullgraph=True)(*given)
        assert moved.equal(move(*given))
        assert not moved.equal(ids[:first])
