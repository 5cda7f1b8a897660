"""The rules that thresholds are compared with: what each decides, against plain loops over each token."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modes_fx.errors import ModesFxError, PlanError
from modes_fx.plan import PlanPoint, SkipPlan
from modes_fx.policies import RULES, Rule, decide, register
from modes_fx.policies.chance import seed_tables
from modes_fx.policies.sere import all_but_padding
from tests import oracle
from tests.policies.tables import table_for

FAST = settings(max_examples=40)
LEVELS = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0])  # sums and products of these are exact
TOP_K = st.integers(1, 4)
BETA = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0, 1.5])
RULES_OF_ONE_TOKEN = ("naee", "naee_top2", "diep", "random", "top_p", "entropy_k")
KEEPS_RANK_1 = ("naee_top2", "top_p", "entropy_k")
EXPERTS = 5


@st.composite
def routed(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Weights [T, K] in any order, ties and zeros among them, and distinct experts."""
    top_k, tokens = draw(TOP_K), draw(st.integers(1, 4))
    weights = [[draw(LEVELS) for _ in range(top_k)] for _ in range(tokens)]
    ids = [draw(st.permutations(range(EXPERTS)))[:top_k] for _ in range(tokens)]
    return torch.tensor(weights), torch.tensor(ids)


def decided(name: str, weights: Tensor, ids: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """What a rule keeps, and the weights of what it keeps."""
    classes = torch.zeros(len(weights), dtype=torch.int64)
    keep, other = decide(
        RULES[name].keep, ids, weights, classes, torch.tensor([beta]), table_for(name, EXPERTS)
    )  # fmt: skip
    return keep, weights if other is None else other


@pytest.mark.parametrize("name", RULES_OF_ONE_TOKEN)
@FAST
@given(routing=routed(), beta=BETA)
def test_a_rule_decides_like_its_paper(name: str, routing: tuple[Tensor, Tensor], beta: float) -> None:
    weights, ids = routing
    wanted = oracle.decide(name, weights, ids, torch.full((len(weights),), beta), table_for(name, EXPERTS))
    keep, new_weights = decided(name, weights, ids, beta)
    assert keep.equal(~wanted.isnan())
    torch.testing.assert_close(new_weights.double()[keep], wanted[keep], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", RULES_OF_ONE_TOKEN)
def test_more_is_dropped_the_larger_the_bound(name: str) -> None:
    weights, ids = torch.rand(40, 4).softmax(1), torch.stack([torch.randperm(EXPERTS)[:4] for _ in range(40)])
    levels = [0.0, 0.2, 0.5, 0.9, 1.1, 50.0, math.inf]
    if name == "top_p":  # whose bound says how much is kept
        levels = [math.inf, 1.1, 0.95, 0.8, 0.5, 0.1, 0.0]
    keeps = [decided(name, weights, ids, level)[0] for level in levels]
    assert keeps[0].all()
    assert not keeps[-1].any()
    for less, more in pairwise(keeps):
        assert not (more & ~less).any()
    at_the_end = keeps[-2]
    if name in KEEPS_RANK_1:  # so that no more than 1 - 1/K can be skipped
        assert at_the_end.equal(weights == weights.amax(1, keepdim=True))
    else:
        assert not at_the_end.any()


def test_with_one_expert_a_token_nothing_is_left_to_choose_from() -> None:
    weights, ids = torch.tensor([[0.3], [0.0]]), torch.tensor([[2], [1]])
    assert decided("naee", weights, ids, 1.0)[0].all()
    assert decided("naee_top2", weights, ids, 9.0)[0].all()
    assert decided("naee", weights, ids, 1.1)[0].tolist() == [[False], [True]]  # 0 is not below 1.1 * 0


def test_naee_as_published_hands_the_whole_sum_to_the_survivors() -> None:
    weights, ids = torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([[0, 1], [2, 3]])
    keep, new_weights = decided("naee_top2", weights, ids, 0.5)
    assert keep.tolist() == [[True, False], [True, True]]
    assert new_weights.tolist() == [[1.0, 0.0], [0.5, 0.5]]


def test_top_p_keeps_the_fewest_that_reach_p() -> None:
    weights, ids = torch.tensor([[0.125, 0.75, 0.125], [0.5, 0.25, 0.25]]), torch.tensor([[0, 1, 2], [2, 3, 4]])
    keep, new_weights = decided("top_p", weights, ids, 0.75)
    assert keep.tolist() == [[False, True, False], [True, True, False]]
    assert new_weights.equal(weights)
    assert decided("top_p", weights, ids, 1.0)[0].all()
    assert decided("top_p", weights / 2, ids, 0.75)[0].all()  # all there is sums to 0.5


def test_top_p_of_renormalised_weights_is_naee_with_one_beta() -> None:
    weights, ids = torch.rand(60, 4).softmax(1), torch.stack([torch.randperm(EXPERTS)[:4] for _ in range(60)])
    for p in (0.3, 0.6, 0.9):
        assert decided("top_p", weights, ids, p)[0].equal(decided("naee", weights, ids, 1 - p)[0])


def test_k_by_entropy_has_the_packages_thresholds_and_hands_the_whole_sum_to_the_survivors() -> None:
    weights = torch.tensor([[0.94, 0.02, 0.02, 0.02], [0.7, 0.24, 0.03, 0.03], [0.25, 0.25, 0.25, 0.25]])
    entropy = torch.special.entr(weights).sum(1)
    assert entropy[0] < 0.6 < entropy[1] < 1.2 < entropy[2]
    ids = torch.arange(4).expand(3, 4)
    keep, new_weights = decided("entropy_k", weights, ids, 0.6 / math.log(2))
    assert keep.sum(1).tolist() == [1, 2, 4]
    torch.testing.assert_close(new_weights.sum(1), torch.ones(3))
    assert new_weights[2].equal(weights[2])


def test_a_similarity_of_one_makes_diep_naee() -> None:
    weights, ids = torch.rand(30, 4), torch.stack([torch.randperm(EXPERTS)[:4] for _ in range(30)])
    bounds = torch.full((30,), 0.4)
    alike = RULES["diep"].keep(weights, bounds, ids, torch.ones(EXPERTS, EXPERTS))
    assert alike.equal(RULES["naee"].keep(weights, bounds))


def test_chance_drops_the_share_that_it_is_told_and_another_in_each_layer() -> None:
    weights, ids = torch.rand(2000, 4), torch.stack([torch.randperm(64)[:4] for _ in range(2000)])
    seeds = [torch.tensor(table) for table in seed_tables(2, seed=3)]
    keeps = [RULES["random"].keep(weights, torch.full((2000,), 0.7), ids, table) for table in seeds]
    for keep in keeps:
        assert abs(float(keep.float().mean()) - 0.3) < 0.02
    assert abs(float((keeps[0] & keeps[1]).float().mean()) - 0.09) < 0.02
    assert seed_tables(2, seed=3) == seed_tables(2, seed=3) != seed_tables(2, seed=4)


def test_a_rule_that_asks_for_what_there_is_not_is_refused() -> None:
    with pytest.raises(ModesFxError, match="asks for logits_TE"):
        Rule(lambda weights_TK, bound_T, logits_TE: weights_TK > 0, 0.0, 1.0)
    with pytest.raises(ModesFxError, match="table_EE, table_1"):
        Rule(lambda weights_TK, bound_T, table_EE, table_1: weights_TK > 0, 0.0, 1.0)
    with pytest.raises(ModesFxError, match=r"re-routes by .* in this order; this one asks for table_EE, expert_ids_TK"):
        Rule(all_but_padding, 0.0, 1.0, reroute=lambda weights_TK, bound_T, table_EE, expert_ids_TK: expert_ids_TK)
    with pytest.raises(ModesFxError, match="asks for expert_ids_TK, table_E"):  # one table, not two
        Rule(RULES["oea"].keep, 0.0, 1.0, reroute=RULES["sere"].reroute)


def test_the_packages_own_rules_cannot_be_replaced() -> None:
    with pytest.raises(ModesFxError, match="'naee' is modes-fx's own"):
        register("naee", RULES["threshold"])


def test_a_plan_has_tables_if_and_only_if_its_rule_asks_for_one() -> None:
    points = (PlanPoint(None, 0.5, 0.5),)
    with pytest.raises(PlanError, match="'random' takes a table"):
        SkipPlan(points, rule="random")
    with pytest.raises(PlanError, match="'naee' takes no table"):
        SkipPlan(points, rule="naee", tables=((1.0,),))
    with pytest.raises(PlanError, match="1 MoE layers, the model has 2"):
        SkipPlan(points, rule="random", tables=((1.0,),)).table_tensors(2)
    with pytest.raises(PlanError, match="rows of numbers"):
        SkipPlan(points, rule="diep", tables=(((1.0,), (1.0, 2.0)),)).table_tensors(1)
