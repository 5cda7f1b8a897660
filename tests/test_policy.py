"""The keep-rules."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modes_fx.policies import RULES, Rule, decide
from modes_fx.policies.reduce_k import among_largest
from modes_fx.policies.threshold import at_least_threshold
from tests import oracle

FAST = settings(max_examples=40)
WEIGHTS = st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]), min_size=4, max_size=4), min_size=1, max_size=5).map(
    torch.tensor
)


def kept(rule: Rule, weights: torch.Tensor, bound: float) -> torch.Tensor:
    """What a rule keeps of tokens whose experts are 0 to K - 1, under one bound and a table of ones."""
    tokens, top_k = weights.shape
    ids = torch.arange(top_k).expand(tokens, top_k)
    table = torch.ones(rule.table_shape(top_k)) if rule.has_table else None
    classes = torch.zeros(tokens, dtype=torch.int64)
    return decide(rule.keep, ids, weights, classes, torch.tensor([bound]), table)[0]


def test_a_weight_is_kept_from_its_threshold_on() -> None:
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    assert at_least_threshold(weights, torch.tensor([0.3, 0.31])).tolist() == [[True, True, False], [True, False, False]]


def test_a_threshold_of_zero_keeps_weights_of_zero_and_an_infinite_one_keeps_nothing() -> None:
    weights = torch.tensor([[1.0, 0.0]])
    assert at_least_threshold(weights, torch.tensor([0.0])).all()
    assert not at_least_threshold(weights, torch.tensor([math.inf])).any()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_pair_without_an_expert_is_never_kept(rule: Rule) -> None:
    weights = torch.tensor([[-math.inf, 0.6, 0.0]])
    assert kept(rule, weights, rule.keep_all).tolist() == [[False, True, True]]
    assert not kept(rule, weights, rule.skip_all).any()


def test_ties_go_to_the_earlier_expert_so_that_exactly_k_are_kept() -> None:
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.1, 0.4, 0.1, 0.4]])
    assert among_largest(weights, torch.tensor([2.0, 3.0])).tolist() == [[True, True, False, False], [True, True, False, True]]


@FAST
@given(WEIGHTS, st.integers(0, 5))
def test_reduce_k_equals_sorting_each_token_and_keeps_k(weights: torch.Tensor, k: int) -> None:
    bound = torch.full((len(weights),), float(k))
    kept = among_largest(weights, bound)
    assert kept.equal(oracle.largest(weights, bound))
    assert kept.sum(1).tolist() == [min(k, 4)] * len(weights)


@FAST
@given(WEIGHTS, st.sampled_from(sorted(RULES)))
def test_the_ends_of_each_rule_keep_all_and_skip_all(weights: torch.Tensor, name: str) -> None:
    rule = RULES[name]
    assert kept(rule, weights, rule.keep_all).all()
    assert not kept(rule, weights, rule.skip_all).any()


@pytest.mark.parametrize("name", sorted(RULES))
def test_no_token_is_a_case_like_any_other(name: str) -> None:
    assert kept(RULES[name], torch.empty(0, 4), 0.5).shape == (0, 4)
