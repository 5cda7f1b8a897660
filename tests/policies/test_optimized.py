"""Other rules than the default in a whole model: the plan's tables reach each layer, and new ones compile nothing."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import modes_fx
from modes_fx.calib import Objective
from modes_fx.errors import PlanError
from modes_fx.plan import PlanPoint, SkipPlan
from modes_fx.policies.batch_threshold import slack_tables
from modes_fx.policies.chance import seed_tables
from tests import harness, oracle, tiny
from tests.calib.conftest import with_answers
from tests.policies.tables import bound_for

pytestmark = pytest.mark.usefixtures("without_inductor")

INPUTS = tiny.mixed_batch(seed=2)
OTHERS = ("naee", "naee_top2", "diep", "random", "batch_threshold", "top_p", "entropy_k")
_NO_SHARES = ("top_p", "entropy_k")  # whose bounds are no shares


def plan(rule: str, beta: float, seed: int = 0) -> SkipPlan:
    tables = None
    if rule == "random":
        tables = seed_tables(2, seed)
    if rule == "batch_threshold":
        tables = slack_tables(2, 6, 0.25 + 0.25 * seed)
    if rule == "diep":
        noise = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(seed)) + 0.5
        tables = tuple(tuple(tuple(row) for row in layer) for layer in noise.tolist())
    text, vision = (bound_for(rule, share) for share in (beta, beta * 0.8)) if rule in _NO_SHARES else (beta, beta * 0.8)
    return SkipPlan((PlanPoint(None, text, vision),), ((1.0, 0.5), (0.8, 1.0)), rule=rule, tables=tables)


def oracles_answer(made: SkipPlan, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and kept pairs of an eager model whose weights are silenced, or changed, as the oracle decides."""
    bounds, classes = made.bounds(2), tiny.classes(inputs)
    tables = [None] * 2 if made.tables is None else made.table_tensors(2)
    model, kept = tiny.make(), torch.zeros(2, 2, dtype=torch.int64)
    model.set_experts_implementation("eager")
    for layer, experts in enumerate(oracle.experts_of(model)):

        def silence(module: nn.Module, args: tuple[Tensor, ...], layer: int = layer) -> tuple[Tensor, ...]:
            hidden, ids, weights = args
            flat = classes.flatten()
            bound = torch.cat([bounds[layer], torch.tensor([torch.inf])])[flat]
            mine = oracle.decide(made.rule, weights, ids, bound, tables[layer])
            mine[flat == 2] = torch.nan
            for modality in range(2):
                kept[layer, modality] += int((~mine.isnan())[flat == modality].sum())
            return hidden, ids, mine.nan_to_num().to(weights.dtype)

        experts.register_forward_pre_hook(silence)
    return harness.logits(model, inputs), kept


@pytest.mark.parametrize("rule", OTHERS)
def test_a_whole_model_skips_what_the_oracle_drops_and_new_numbers_compile_nothing(vlm: nn.Module, rule: str) -> None:
    modes_fx.optimize(vlm, plan(rule, 0.5))
    graphs = []
    for made in (plan(rule, 0.5), plan(rule, 0.3, seed=1), plan(rule, 0.0)):
        wanted, kept = oracles_answer(made, INPUTS)
        modes_fx.set_plan(vlm, made)
        with modes_fx.stats(vlm).reset() as stats:
            actual = harness.logits(vlm, INPUTS)
        assert stats.pairs_kept.sum(-1).equal(kept)
        assert harness.relative_error(actual, wanted, tiny.classes(INPUTS) != 2) < 1e-4
        graphs.append(modes_fx.report(vlm).graphs)
    assert len(set(graphs)) == 1
    assert stats.skip_ratio() == 0.0


def test_the_objective_measures_any_rule(vlm: nn.Module) -> None:
    modes_fx.optimize(vlm, plan("naee_top2", 0.5))
    objective = Objective(vlm, [with_answers(1)])
    assert objective.evaluate(torch.zeros(2, 2)).kl == 0.0
    found = objective.evaluate(torch.full((2, 2), 1e9))
    assert found.skip_ratio == pytest.approx(2 / 3)  # rank 1 of 3 stays
    assert found.kl > 0


@pytest.mark.parametrize("rule", ["diep", "random", "naee", "batch_threshold"])
def test_a_plan_keeps_its_rule_and_its_tables_in_a_file(tmp_path: Path, rule: str) -> None:
    made = plan(rule, 0.5)
    assert SkipPlan.load(made.save(tmp_path / "plan.json")) == made


def test_tables_of_another_shape_or_number_are_refused(vlm: nn.Module) -> None:
    points = (PlanPoint(None, 0.5, 0.5),)
    with pytest.raises(PlanError, match="tables for 1 MoE layers, the model has 2"):
        modes_fx.optimize(vlm, SkipPlan(points, rule="random", tables=((1.0,),)))
    with pytest.raises(PlanError, match=r"shape \[2, 2\], the layer needs \[6, 6\]"):
        modes_fx.optimize(vlm, SkipPlan(points, rule="diep", tables=(((1.0, 1.0), (1.0, 1.0)),) * 2))
    assert getattr(vlm, "_modes_fx", None) is None
