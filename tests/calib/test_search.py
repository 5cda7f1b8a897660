"""The search on a tiny model: targets met on the data, thresholds no worse than any of its grid, all of it on record."""

import importlib
import itertools
import math
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modes_fx
from modes_fx.calib import Evaluation, FrontierPoint, Importance, Objective, Trial, search
from modes_fx.calib.search import _nearest, _starts, score_grid
from modes_fx.calib.trials import data_hash
from modes_fx.errors import CalibrationError, NotOptimizedError
from modes_fx.optimize import optimized_state
from modes_fx.plan import PlanPoint, SkipPlan
from tests import tiny
from tests.calib.conftest import Batch, oracle_kl, with_answers
from tests.harness import model_state

TARGETS = (0.3, 0.6)
IMPORTANCE = Importance(((0.6, 1.0), (0.4, 0.0)), ((0.6, 1.0), (0.4, 0.0)), "reference", 12)


@pytest.fixture(scope="module")
def data() -> list[Batch]:
    return [with_answers(1), with_answers(2, side="right")]


@pytest.fixture(scope="module")
def held_out() -> list[Batch]:
    return [with_answers(9)]


@pytest.fixture(scope="module")
def trials() -> list[Trial]:
    return []


@pytest.fixture(scope="module")
def plan(model: nn.Module, data: list[Batch], held_out: list[Batch], trials: list[Trial]) -> SkipPlan:
    return search(model, data, IMPORTANCE, TARGETS, gammas=(0.0, 0.5), grid_size=5, held_out=held_out, on_trial=trials.append)


def test_each_target_is_met_on_the_data_by_the_oracles_count(plan: SkipPlan, data: list[Batch]) -> None:
    assert plan.targets == TARGETS
    for target in TARGETS:
        kl, routed, kept = oracle_kl(data, plan.bounds(2, target))
        point = plan.point(target)
        ratio = 1 - int(kept.sum()) / int(routed.sum())
        assert ratio >= target
        assert point.realised["calibration"] == pytest.approx(ratio)
        assert point.realised["text"] == pytest.approx(1 - int(kept[:, 0].sum()) / int(routed[:, 0].sum()))
        assert point.realised["vision"] == pytest.approx(1 - int(kept[:, 1].sum()) / int(routed[:, 1].sum()))
        assert point.kl["calibration"] == pytest.approx(kl, rel=1e-4, abs=1e-7)


def test_no_choice_of_the_grid_meets_a_target_at_less_loss(model: nn.Module, plan: SkipPlan, data: list[Batch]) -> None:
    """Exhaustive search over the same grid; where the search reports violations of monotonicity it may be beaten, slightly."""
    objective = Objective(model, data)
    routing = objective.routing_weights()
    best = dict.fromkeys(TARGETS, math.inf)
    for gamma in (0.0, 0.5):
        grids = []
        for modality in range(2):
            factors = [row[modality] ** gamma for row in IMPORTANCE.alpha]
            grids.append(score_grid(*routing.scores(modality, factors), 5))
        for text, vision in itertools.product(*grids):
            candidate = SkipPlan((PlanPoint(None, text, vision, gamma),), IMPORTANCE.alpha)
            evaluation = objective.evaluate(candidate.bounds(2))
            for target in TARGETS:
                if evaluation.skip_ratio >= target:
                    best[target] = min(best[target], evaluation.kl)
    slack = plan.provenance["search"]["largest_violation"]
    bounds = {row["target"]: row for row in plan.provenance["search"]["lower_bounds"]}
    for target in TARGETS:
        assert best[target] <= bounds[target]["kl"] <= best[target] + slack + 1e-9


def test_it_ends_where_it_was_sent_or_as_near_as_the_scores_allow(plan: SkipPlan, trials: list[Trial]) -> None:
    """A grid of five is coarse: its best points lie up to a quarter of all pairs above their targets."""
    facts = plan.provenance["search"]
    assert 0 < facts["refined"] <= (facts["evaluations"] - facts["refined"]) / 3
    for target in TARGETS:
        point = plan.point(target)
        reached = [trial.evaluation for trial in trials if trial.evaluation.skip_ratio >= target]
        near = [found for found in reached if found.skip_ratio <= target + 0.005]
        assert point.kl["calibration"] == min(found.kl for found in near or reached)
        assert point.realised["calibration"] >= target
    on_grids = [trial.evaluation.skip_ratio for trial in trials[: -facts["refined"]]]
    nearest = [min(ratio for ratio in on_grids if ratio >= target) for target in TARGETS]
    assert sum(plan.point(target).realised["calibration"] for target in TARGETS) < sum(nearest)


def test_it_steps_down_from_all_minimal_points_that_lose_about_the_least_and_the_best_comes_first() -> None:
    def trial(gamma: float, text: float, vision: float, kl: float, ratio: float) -> Trial:
        return Trial(gamma, text, vision, Evaluation(kl, ratio, ratio, ratio, 1.0))

    best, other, of_another = (
        trial(0.5, 0.2, 0.4, 1.00e-3, 0.53),
        trial(0.5, 0.1, 0.6, 1.01e-3, 0.58),
        trial(0, 0.1, 0.3, 1.4e-3, 0.5),
    )
    above, worse, missed = (
        trial(0.5, 0.2, 0.5, 1.2e-3, 0.57),
        trial(0.5, 0.0, 0.9, 2e-3, 0.51),
        trial(0.5, 0.1, 0.4, 2e-4, 0.49),
    )
    made = [above, of_another, worse, other, missed, best]
    assert _starts(made, 0.5) == [best, other, of_another]
    assert _starts(made, 0.55) == [other, above]
    assert _starts(made, 0.6) == []


def test_what_ends_near_its_target_is_not_worse_than_the_best_of_the_grids() -> None:
    """Of the trials that reach a target: near ones count if they lie below the grids' best point, or lose no more."""
    best = FrontierPoint(0.5, 0.2, 0.4, loss=1e-3, ratio=0.53)

    def trial(gamma: float, text: float, vision: float, kl: float, ratio: float) -> Trial:
        return Trial(gamma, text, vision, Evaluation(kl, ratio, ratio, ratio, 1.0))

    on_grids = trial(0.5, 0.2, 0.4, 1e-3, 0.53)
    elsewhere, below = trial(0.0, 0.9, 0.9, 5e-2, 0.501), trial(0.5, 0.2, 0.38, 1.1e-3, 0.504)
    missed, better = trial(0.5, 0.2, 0.3, 1e-4, 0.49), trial(0.0, 0.1, 0.6, 9e-4, 0.502)
    for made, expected in (
        ([on_grids, elsewhere, missed], on_grids),
        ([on_grids, elsewhere, below, missed], below),
        ([on_grids, elsewhere, below, better], better),
    ):
        trials: Any = types.SimpleNamespace(made=dict(enumerate(made)))
        assert _nearest(trials, 0.5, best) is expected


def test_held_out_data_is_measured(plan: SkipPlan, held_out: list[Batch]) -> None:
    for target in TARGETS:
        kl, routed, kept = oracle_kl(held_out, plan.bounds(2, target))
        assert plan.point(target).kl["held_out"] == pytest.approx(kl, rel=1e-4, abs=1e-7)
        assert plan.point(target).realised["held_out"] == pytest.approx(1 - int(kept.sum()) / int(routed.sum()))


def test_the_plan_says_where_it_came_from(plan: SkipPlan, data: list[Batch], trials: list[Trial]) -> None:
    assert plan.alpha == IMPORTANCE.alpha
    assert plan.layers == tuple(f"model.language_model.layers.{i}.mlp.experts" for i in range(2))
    plan.check_model(tiny.make().config)
    facts = plan.provenance
    assert facts["data_hash"] == data_hash(data)
    assert (facts["answer_tokens"], facts["importance_mode"]) == (12, "reference")
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["search"]["evaluations"] == len(trials) > 0
    assert facts["search"]["gammas"] == [0.0, 0.5]
    assert facts["search"]["unreachable_targets"] == []
    assert facts["search"]["gammas_searched"] == [0.5, 0.0]
    assert {point.gamma for point in plan.points} <= {0.0, 0.5}


def test_a_finished_search_bounds_its_losses_by_themselves(plan: SkipPlan) -> None:
    assert plan.provenance["search"]["complete"]
    for bound in plan.provenance["search"]["lower_bounds"]:
        assert bound["kl"] == bound["lower_bound"] == bound["lower_bound_of_gammas_searched"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """The search's clock, which stands still until the test moves it."""
    clock = types.SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    for module in ("search", "trials"):
        monkeypatch.setattr(importlib.import_module(f"modes_fx.calib.{module}"), "time", clock)
    return clock


@pytest.mark.parametrize("budget", [3, 6, 12, 18])
def test_when_the_time_is_over_the_best_so_far_is_the_plan(
    model: nn.Module, data: list[Batch], plan: SkipPlan, clock: types.SimpleNamespace, budget: float
) -> None:
    trials: list[Trial] = []

    def tick(trial: Trial) -> None:
        trials.append(trial)
        clock.now += 1

    short = search(model, data, IMPORTANCE, TARGETS, gammas=(0.0, 0.5), grid_size=5, time_budget=budget, on_trial=tick)
    facts, whole = short.provenance["search"], plan.provenance["search"]
    assert budget <= len(trials) <= budget + len(TARGETS)
    assert not facts["complete"]
    assert (facts["seconds"], facts["gammas_searched"][0]) == (len(trials), 0.5)
    for bound, exact in zip(facts["lower_bounds"], whole["lower_bounds"], strict=True):
        reached = [trial.evaluation.kl for trial in trials if trial.evaluation.skip_ratio >= bound["target"]]
        assert bound["kl"] == min(reached, default=None)
        assert bound["lower_bound"] <= exact["kl"] + 2 * whole["largest_violation"]
        assert bound["lower_bound"] <= bound["lower_bound_of_gammas_searched"]
        assert (bound["lower_bound"] == 0) or len(facts["gammas_searched"]) == 2
    assert facts["unreachable_targets"] == []


def test_a_time_budget_without_time_is_an_error_that_says_what_to_do(
    model: nn.Module, data: list[Batch], clock: types.SimpleNamespace
) -> None:
    def end(trial: Trial) -> None:
        clock.now += 60

    with pytest.raises(CalibrationError, match=r"after \d evaluations, before any target .* name a journal"):
        search(model, data, IMPORTANCE, [1.0], gammas=[0.5], grid_size=5, time_budget=60, on_trial=end)
    with pytest.raises(CalibrationError, match="time_budget is 0"):
        search(model, data, IMPORTANCE, time_budget=0)


def test_progress_ends_where_the_search_does(model: nn.Module, data: list[Batch]) -> None:
    steps: list[tuple[int, int]] = []
    plan = search(model, data[:1], IMPORTANCE, [0.5], gammas=[0.5], grid_size=5, on_progress=lambda *step: steps.append(step))
    assert sorted({done for done, _ in steps}) == list(range(1, plan.provenance["search"]["evaluations"] + 1))
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert all(done <= total for done, total in steps)
    assert steps[-1][0] == steps[-1][1]


def test_the_trials_that_no_other_beats_are_in_the_plan(plan: SkipPlan, trials: list[Trial]) -> None:
    undominated = [
        (trial.gamma, trial.tau_text, trial.tau_vision)
        for trial in trials
        if not any(
            other.evaluation.skip_ratio >= trial.evaluation.skip_ratio
            and other.evaluation.kl <= trial.evaluation.kl
            and other.evaluation != trial.evaluation
            for other in trials
        )
    ]
    kept = plan.frontier
    assert {(point.gamma, point.tau_text, point.tau_vision) for point in kept} <= set(undominated)
    ratios = [point.realised["calibration"] for point in kept]
    assert ratios == sorted(set(ratios))
    assert len(ratios) == len(
        {trial.evaluation.skip_ratio for trial in trials if (trial.gamma, trial.tau_text, trial.tau_vision) in undominated}
    )
    losses = [point.kl["calibration"] for point in kept]
    assert losses == sorted(losses)
    for point in plan.points:  # what skips more at less loss may be further from the target than a point that ends near it
        better = [ratio for ratio, loss in zip(ratios, losses, strict=True) if loss < point.kl["calibration"]]
        assert point.kl["calibration"] in losses or max(better) > (point.target or 0) + 0.005


def test_no_choice_is_evaluated_twice_and_none_outside_the_grid(plan: SkipPlan, trials: list[Trial]) -> None:
    keys = [(trial.gamma, trial.tau_text, trial.tau_vision) for trial in trials]
    assert len(set(keys)) == len(keys) <= 2 * 5 * 5 * 4 / 3
    for point in plan.points:
        assert (point.gamma, point.tau_text, point.tau_vision) in keys


def test_the_plan_survives_its_file_and_takes_effect(model: nn.Module, plan: SkipPlan, tmp_path: Path) -> None:
    path = plan.save(tmp_path / "plan.json")
    assert SkipPlan.load(path) == plan
    modes_fx.set_plan(model, path, target=TARGETS[0])
    in_force = optimized_state(model).runtime.bounds_in_force
    modes_fx.set_plan(model, None)
    assert in_force.equal(plan.bounds(2, TARGETS[0]))


def test_an_optimised_model_keeps_its_thresholds(model: nn.Module, data: list[Batch]) -> None:
    modes_fx.set_plan(model, SkipPlan.uniform(text=0.25, vision=0.5))
    search(model, data[:1], IMPORTANCE, [0.5], gammas=[0.0], grid_size=3)
    assert optimized_state(model).runtime.bounds_in_force.tolist() == [[0.25, 0.5]] * 2
    modes_fx.set_plan(model, None)


@pytest.mark.usefixtures("without_inductor")
def test_a_stock_model_is_a_stock_model_afterwards(vlm: nn.Module, data: list[Batch]) -> None:
    before = model_state(vlm)
    search(vlm, data[:1], IMPORTANCE, [0.5], gammas=[0.0], grid_size=3)
    assert model_state(vlm) == before
    with pytest.raises(NotOptimizedError):
        modes_fx.stats(vlm)


def test_all_can_be_skipped_by_a_threshold_above_every_score(model: nn.Module, data: list[Batch]) -> None:
    unknown = Importance(((0.0, 0.0),) * 2, ((0.0, 0.0),) * 2, "paper", 12)
    plan = search(model, data[:1], IMPORTANCE, [0.5, 1.0], gammas=[0.0], grid_size=3)
    assert plan.targets == (0.5, 1.0)
    assert plan.point(1.0).realised["calibration"] == 1.0
    assert search(model, data[:1], unknown, [0.5], gammas=[1.0], grid_size=3).point(0.5).realised["calibration"] >= 0.5


@pytest.mark.usefixtures("without_inductor")
def test_a_target_that_cannot_be_met_is_left_out_and_named(vlm: nn.Module, data: list[Batch]) -> None:
    """The first layer's experts drown what the second one's router reads: skipping them raises weights above every score."""
    first, second = vlm.model.language_model.layers
    with torch.no_grad():
        first.mlp.experts.down_proj[:, :16] *= 1000
        first.mlp.experts.down_proj[:, 16:] = 0
        for layer in (first, second):
            layer.mlp.gate.weight[:, :16] = 0
        first.mlp.gate.weight *= 0.01
    plan = search(vlm, data[:1], IMPORTANCE, [1.0, 0.5], gammas=[0.0], grid_size=3)
    facts = plan.provenance["search"]
    assert (plan.targets, facts["unreachable_targets"], facts["complete"]) == ((0.5,), [1.0], True)
    assert max(point.realised["calibration"] for point in plan.frontier) < 1
    unreachable, reachable = facts["lower_bounds"]
    assert unreachable == {"target": 1.0, "kl": None, "lower_bound": None, "lower_bound_of_gammas_searched": None}
    assert reachable["lower_bound"] == reachable["kl"] >= plan.point(0.5).kl["calibration"]
    with pytest.raises(CalibrationError, match=r"No target of \[1\.0\] can be reached"):
        search(vlm, data[:1], IMPORTANCE, [1.0], gammas=[0.0], grid_size=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid_size": 1}, "grid of at least 2"),
        ({"gammas": []}, "grid of at least 2"),
        ({"targets": []}, "grid of at least 2"),
        ({"targets": [75.0]}, "arget"),
        ({"gammas": [-1.0]}, "gammas are .*finite exponents >= 0"),
        ({"gammas": [math.nan]}, "gammas are .*finite exponents >= 0"),
    ],
)
def test_arguments_that_leave_nothing_to_search_are_refused(
    model: nn.Module, data: list[Batch], options: dict[str, object], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        search(model, data, IMPORTANCE, **({"targets": [0.5]} | options))


def test_an_importance_of_another_model_is_refused(model: nn.Module, data: list[Batch]) -> None:
    with pytest.raises(CalibrationError, match="3 MoE layers, the model has 2"):
        search(model, data, Importance(((0.3, 0.3),) * 3, ((0.3, 0.3),) * 3, "paper", 12), [0.5])


@pytest.mark.parametrize("target", [1.5, -0.1, math.nan])
def test_a_target_outside_of_0_to_1_is_refused(model: nn.Module, data: list[Batch], target: float) -> None:
    with pytest.raises((CalibrationError, modes_fx.errors.PlanError), match="arget"):
        search(model, data[:1], IMPORTANCE, [target], gammas=[0.0], grid_size=2)


def test_the_grid_goes_from_none_to_all_in_smaller_and_smaller_steps() -> None:
    scores = torch.rand(1000, generator=torch.Generator().manual_seed(0)).sort().values
    grid = score_grid(scores.double(), torch.ones(1000, dtype=torch.int64), 11)
    assert grid == sorted(set(grid))
    assert len(grid) == 11
    shares = [float((scores < tau).float().mean()) for tau in grid]
    assert shares == pytest.approx([1 - (1 - i / 10) ** 1.5 for i in range(11)], abs=0.01)
    none, one = torch.empty(0, dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64)
    assert score_grid(none, none.long(), 4) == [0.0]
    assert score_grid(one, torch.tensor([5]), 4) == pytest.approx([0.0, 0.25, 0.25], rel=0.01)


def test_the_hash_of_data_sees_every_tensor_and_not_their_order_in_the_batch(data: list[Batch]) -> None:
    shuffled = [dict(reversed(batch.items())) for batch in data]
    assert data_hash(shuffled) == data_hash(data)
    assert data_hash(data[:1]) != data_hash(data)
    assert data_hash([{**data[0], "pixel_values": data[0]["pixel_values"] + 1}, data[1]]) != data_hash(data)
