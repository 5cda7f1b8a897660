"""The marker: what it computes, and that torch may take it apart anywhere."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from modes_fx.errors import ModesFxError
from modes_fx.graph import marker
from modes_fx.policies import RULES, Rule, key_of, register, rule_of
from tests import oracle
from tests.policies.tables import table_for

EXPERTS = 6


def arguments(rule: str, dtype: torch.dtype = torch.float32, *, grad: bool = False) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    weights, ids = torch.rand(7, EXPERTS, generator=generator).softmax(1).topk(3)
    weights = weights.to(dtype).requires_grad_(grad)
    classes = torch.arange(7) % 3
    table = table_for(rule, EXPERTS) if RULES[rule].has_table else None
    return weights, ids, classes, torch.tensor([0.15, 0.2, math.inf]), table, rule, "auto", -1


@pytest.mark.parametrize(
    "rule", ["threshold", "naee", "naee_top2", "diep", "random", "batch_threshold", "top_p", "entropy_k", "oea"]
)
def test_it_is_an_operation_like_torchs_own(rule: str) -> None:
    torch.library.opcheck(marker.keep, arguments(rule))


def test_dropped_pairs_get_weight_0_and_the_others_keep_theirs_bit_by_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        given = arguments("threshold", dtype)
        weights, kept = marker.keep(*given)
        wanted = oracle.at_least(given[0], given[3][given[2]])
        assert kept.equal(wanted)
        assert weights.equal(torch.where(wanted, given[0], 0))
        assert weights.dtype == dtype


def test_gradients_reach_the_kept_weights_alone() -> None:
    given = arguments("threshold", grad=True)
    weights, kept = marker.keep(*given)
    weights.sum().backward()
    assert given[0].grad.equal(kept.float())


@pytest.mark.usefixtures("rules")
def test_a_graph_keeps_the_rule_that_it_was_made_with() -> None:
    def largest_alone(weights_TK: Tensor, bound_T: Tensor) -> Tensor:
        return weights_TK >= weights_TK.amax(dim=1, keepdim=True)

    def all_of_them(weights_TK: Tensor, bound_T: Tensor) -> Tensor:
        return weights_TK >= 0

    register("mine", Rule(largest_alone, 0.0, math.inf))
    first = key_of("mine")
    register("mine", Rule(all_of_them, 0.0, math.inf))
    second = key_of("mine")
    assert (rule_of(first).keep, rule_of(second).keep) == (largest_alone, all_of_them)
    given = arguments("threshold")
    kept = [int(marker.keep(*given[:5], key, "auto", -1)[1].sum()) for key in (first, second)]
    assert kept == [7, 21]


def test_a_rule_that_nobody_registered_is_an_error_that_says_so() -> None:
    with pytest.raises(ModesFxError, match=r"the rule 'theirs'.*register"):
        marker.keep(*arguments("threshold")[:5], "theirs", "auto", -1)
