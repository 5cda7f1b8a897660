"""Input-adaptive thresholds: the path of bounds, how a forward is steered along it, and what a model makes of it."""

import dataclasses
import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modes_fx
from modes_fx.calib import Objective
from modes_fx.calib.routing import RoutingRecorder
from modes_fx.errors import PlanError
from modes_fx.modality import PADDING
from modes_fx.models.layers import find_moe_layers
from modes_fx.optimize import optimized_state
from modes_fx.plan import PlanPoint, SkipPlan
from modes_fx.plan.budget import Budget, Steering, bound_above, budget_of, share_below
from tests import oracle, tiny
from tests.calib.conftest import with_answers
from tests.families.vision import VISION
from tests.harness import logits

INF = math.inf
LAYERS, TOP_K = 6, 4


def measured(ratio: float, tau_text: float, tau_vision: float, gamma: float = 0.5) -> PlanPoint:
    return PlanPoint(None, tau_text, tau_vision, gamma, {"calibration": ratio}, {"calibration": ratio / 10})


def quantiles(weights: Tensor, size: int = 65) -> tuple[float, ...]:
    return tuple(torch.quantile(weights.double().flatten(), torch.linspace(0, 1, size, dtype=torch.float64)).tolist())


def plan_for(weights_LMN: Tensor, **changes: Any) -> SkipPlan:
    """A plan of one target, 0.5, and quantiles of given weights."""
    frontier = (measured(0.3, 0.05, 0.1), measured(0.4, 0.3, 0.05), measured(0.6, 0.2, 0.3), measured(0.7, 0.3, 0.4, gamma=1.0))
    values = {
        "points": (PlanPoint(0.5, 0.1, 0.2, 0.5),),
        "alpha": tuple((0.5 + layer / 10, 0.9 - layer / 10) for layer in range(len(weights_LMN))),
        "frontier": frontier,
        "mode": "budget",
        "weights": tuple((quantiles(text), quantiles(vision)) for text, vision in weights_LMN),
    }
    return SkipPlan(**{**values, **changes})


@pytest.fixture
def weights() -> Tensor:
    return torch.rand(LAYERS, 2, 4096) ** 2


@pytest.fixture
def plan(weights: Tensor) -> SkipPlan:
    return plan_for(weights)


def forward(budget: Budget, classes: Tensor, weights_LTK: Tensor, *, feedback: bool = True) -> float:
    """Drop what the budget says, layer by layer, as a model would; return the skip ratio of tokens that are no padding."""
    steering, kept = Steering(budget, classes, 0), 0
    for layer, weights_TK in enumerate(weights_LTK):
        keep_TK = weights_TK >= steering.row(layer)[classes].unsqueeze(1)
        kept += int(keep_TK.sum())
        if feedback:
            steering.note(layer, keep_TK)
    return 1 - kept / (int((classes != PADDING).sum()) * TOP_K * len(weights_LTK))


def budget_at(plan: SkipPlan, target: float = 0.5) -> Budget:
    return budget_of(plan, LAYERS, plan.bounds(LAYERS, target), target)


def mixed(text: int, vision: int, padding: int = 0) -> Tensor:
    return torch.cat([torch.full((count,), index) for index, count in enumerate((text, vision, padding))])


def test_shares_and_bounds_are_each_others_reverse(weights: Tensor) -> None:
    table = torch.tensor(plan_for(weights).weights, dtype=torch.float64)
    for share in (0.0, 0.013, 0.5, 0.99, 1.0):
        shares = torch.full((LAYERS, 2), share, dtype=torch.float64)
        bounds = bound_above(shares, table)
        torch.testing.assert_close(share_below(bounds, table), shares)
        torch.testing.assert_close((weights.double() < bounds[..., None]).double().mean(dim=2), shares, atol=0.01, rtol=0)
    assert share_below(torch.full((LAYERS, 2), INF), table).eq(1).all()
    assert share_below(torch.zeros(LAYERS, 2), table).eq(0).all()


def test_equal_weights_are_kept_or_dropped_together() -> None:
    table = torch.full((1, 2, 9), 0.25, dtype=torch.float64)
    for bound, share in ((0.24, 0.0), (0.25, 0.0), (0.26, 1.0)):
        assert share_below(torch.full((1, 2), bound), table).eq(share).all()


def test_the_path_ascends_through_the_measured_points_that_do(plan: SkipPlan) -> None:
    budget = budget_at(plan)
    rows, shares, ahead = budget._rows_LGC, budget._shares_LGM, budget._ahead_LGM
    path = rows[..., :2].transpose(0, 1)
    assert path[0].eq(0).all()
    assert path[-1].isinf().all()
    assert (path[1:] >= path[:-1]).all()
    assert (shares[:, 1:] >= shares[:, :-1]).all()
    assert rows[..., PADDING].isinf().all()
    points = [*plan.points, *plan.frontier]
    knots = [dataclasses.replace(plan, points=(point,)).bounds(LAYERS) for point in points]
    on_it = [bool((path == knot).all(dim=(1, 2)).any()) for knot in knots]
    assert on_it == [True, True, False, True, False]  # one does not ascend, one has another gamma
    torch.testing.assert_close(ahead[0], shares.sum(dim=0))


@pytest.mark.parametrize("target", [0.4, 0.5, 0.6])
@pytest.mark.parametrize(("text", "vision"), [(300, 100), (100, 300), (0, 200), (200, 0)])
def test_any_mixture_of_tokens_meets_the_target_by_the_first_step_alone(
    plan: SkipPlan, target: float, text: int, vision: int
) -> None:
    classes = mixed(text, vision)
    alike = torch.rand(LAYERS, text + vision, TOP_K) ** 2
    assert forward(budget_at(plan, target), classes, alike, feedback=False) == pytest.approx(target, abs=0.035)
    if not vision:
        fixed = plan.bounds(LAYERS, target)[:, classes, None]
        assert abs(float((alike < fixed).float().mean()) - target) > 0.05


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_what_was_dropped_so_far_corrects_the_layers_that_are_left(plan: SkipPlan, scale: float) -> None:
    classes, budget = mixed(100, 200), budget_at(plan)
    other = torch.rand(LAYERS, 300, TOP_K) ** 2 * scale
    blind, seeing = (abs(forward(budget, classes, other, feedback=feedback) - 0.5) for feedback in (False, True))
    assert seeing < 0.3 * blind


def test_padding_counts_nowhere(plan: SkipPlan) -> None:
    budget, some = budget_at(plan), torch.rand(LAYERS, 100, TOP_K)
    padded = torch.cat([some, torch.zeros(LAYERS, 50, TOP_K)], dim=1)
    assert forward(budget, mixed(40, 60, 50), padded) == forward(budget, mixed(40, 60), some)
    assert forward(budget, mixed(40, 60), some) == pytest.approx(0.5, abs=0.1)
    assert Steering(budget, mixed(0, 0, 3), 0).row(0).shape == (3,)


def test_each_forward_starts_anew(plan: SkipPlan) -> None:
    budget, classes = budget_at(plan), mixed(10, 20)
    steering, other = Steering(budget, classes, 0), Steering(budget, classes, 0)
    first = steering.row(0)
    steering.note(0, torch.ones(30, TOP_K, dtype=torch.bool))  # nothing was dropped
    assert (steering.row(1)[:2] > other.row(1)[:2]).all()
    assert Steering(budget, classes, 0).row(0).equal(first)


def test_paths_of_other_lengths_have_the_same_shapes(plan: SkipPlan) -> None:
    budgets = [budget_at(dataclasses.replace(plan, frontier=plan.frontier[:count])) for count in (0, 2, 4)]
    assert len({budget._rows_LGC.shape for budget in budgets}) == 1


def test_nothing_is_asked_back_from_the_device(plan: SkipPlan) -> None:
    """A meta tensor has no values: whatever reads one fails."""
    budget, classes = budget_at(plan), torch.zeros(7, dtype=torch.int64, device="meta")
    steering = Steering(budget.to(torch.device("meta")), classes, 0)
    for layer in range(LAYERS):
        assert steering.row(layer).shape == (3,)
        steering.note(layer, torch.zeros(7, TOP_K, dtype=torch.bool, device="meta"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mode": "adaptive"}, "Unknown mode 'adaptive'"),
        ({"weights": ()}, "budget needs"),
        ({"rule": "reduce_k"}, "budget needs"),
        ({"weights": ((((0.1,), (0.1, 0.2))),)}, "quantiles"),
        ({"weights": ((((0.2, 0.1), (0.1, 0.2))),)}, "quantiles"),
        ({"weights": (((0.1, 0.2),),)}, "quantiles"),
    ],
)
def test_a_plan_that_cannot_be_a_budget_is_refused(plan: SkipPlan, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        dataclasses.replace(plan, **changes)


def test_a_budget_needs_a_target_and_its_own_layers(plan: SkipPlan) -> None:
    with pytest.raises(PlanError, match="by hand"):
        budget_of(dataclasses.replace(plan, points=(PlanPoint(None, 0.1, 0.1),)), LAYERS, torch.zeros(LAYERS, 2), None)
    with pytest.raises(PlanError, match="6 MoE layers, the model has 4"):
        budget_of(plan, 4, torch.zeros(4, 2), 0.5)


# On a model.


def searched(model: nn.Module, inputs: dict[str, Tensor], **changes: Any) -> SkipPlan:
    """A plan with the quantiles that the model routes by."""
    with RoutingRecorder(model) as recorder:
        logits(model, inputs)
    half = [recorder.quantiles(3)[0][modality][1] for modality in range(2)]
    points = (PlanPoint(0.5, *half, 0.0), PlanPoint(1.0, INF, INF, 0.0))
    return SkipPlan(points, weights=recorder.quantiles(), **{"mode": "budget", **changes})


def test_recorded_quantiles_are_those_of_the_dispatched_weights(optimized_vlm: nn.Module) -> None:
    inputs = tiny.mixed_batch(seed=5)
    reference = oracle.Oracle(tiny.make(), None)
    reference(tiny.classes(inputs), **inputs)
    with RoutingRecorder(optimized_vlm) as recorder:
        logits(optimized_vlm, inputs)
    for layer, (weights,) in enumerate(reference.weights):
        for modality in range(2):
            mine = weights[tiny.classes(inputs).reshape(-1) == modality]
            found = recorder.quantiles(5)[layer][modality]
            ordered = mine.double().flatten().sort().values
            wanted = [ordered[max(math.ceil(level / 4 * len(ordered)) - 1, 0)].item() for level in range(5)]
            assert found == pytest.approx(wanted, rel=0.01)
    with RoutingRecorder(optimized_vlm) as recorder:
        logits(optimized_vlm, tiny.text_batch(2, 5))
    assert recorder.quantiles(3)[0][1] == (0.0, 0.0, 0.0)


def test_a_model_keeps_each_input_at_the_target_and_compiles_nothing_for_it(optimized_vlm: nn.Module) -> None:
    plan = searched(optimized_vlm, tiny.mixed_batch(seed=5))
    inputs = [tiny.text_batch(2, 40, seed=1), tiny.mixed_batch(seed=2), tiny.mixed_batch(side="right", seed=3)]
    for batch in inputs:
        logits(optimized_vlm, batch)
    graphs = modes_fx.report(optimized_vlm).graphs
    distances = {}
    for mode in ("fixed", "budget"):
        modes_fx.set_plan(optimized_vlm, dataclasses.replace(plan, mode=mode), 0.5)
        ratios = []
        for batch in inputs:
            with modes_fx.stats(optimized_vlm).reset() as stats:
                logits(optimized_vlm, batch)
            ratios.append(stats.skip_ratio())
        distances[mode] = sum(abs(ratio - 0.5) for ratio in ratios)
    assert distances["budget"] < min(0.15, distances["fixed"])
    assert modes_fx.report(optimized_vlm).graphs == graphs


def test_steering_is_not_counting(optimized_vlm: nn.Module) -> None:
    modes_fx.set_plan(optimized_vlm, searched(optimized_vlm, tiny.mixed_batch()), 0.5)
    logits(optimized_vlm, tiny.mixed_batch())
    assert int(modes_fx.stats(optimized_vlm).pairs_routed.sum()) == 0


def test_decode_steps_keep_their_fixed_thresholds(optimized_vlm: nn.Module) -> None:
    inputs = tiny.mixed_batch(seed=5)
    modes_fx.set_plan(optimized_vlm, searched(optimized_vlm, inputs), 0.5, decode_target=1.0)
    with modes_fx.stats(optimized_vlm) as stats:
        optimized_vlm.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert stats.skip_ratio(phase="decode") == 1.0
    assert stats.skip_ratio(phase="prefill") == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_it_runs_in_inference_mode_and_out_of_it(optimized_vlm: nn.Module, context: Any) -> None:
    inputs = tiny.mixed_batch(seed=5)
    modes_fx.set_plan(optimized_vlm, searched(optimized_vlm, inputs), 0.5)
    with context():
        assert optimized_vlm(**inputs, use_cache=False).logits.isfinite().all()
    assert logits(optimized_vlm, inputs).isfinite().all()


@pytest.mark.parametrize(("region", "dispatch"), [("moe", "static"), ("layer", "compact"), ("model", "compact")])
def test_any_region_and_dispatch_is_steered(vlm: nn.Module, without_inductor: None, region: Any, dispatch: Any) -> None:
    """A region of all layers takes the first step only."""
    modes_fx.optimize(vlm, region=region, dispatch=dispatch)
    modes_fx.set_plan(vlm, searched(vlm, tiny.mixed_batch(seed=5)), 0.5)
    with modes_fx.stats(vlm) as stats:
        logits(vlm, tiny.mixed_batch(seed=5))
    assert stats.skip_ratio() == pytest.approx(0.5, abs=0.1)


def test_calibration_measures_fixed_bounds_and_puts_the_budget_back(optimized_vlm: nn.Module) -> None:
    plan = searched(optimized_vlm, tiny.mixed_batch(seed=5))
    modes_fx.set_plan(optimized_vlm, plan, 0.5)
    runtime = optimized_state(optimized_vlm).runtime
    budget = runtime.bounds_in_force
    assert isinstance(budget, Budget)
    objective = Objective(optimized_vlm, [with_answers(1)])
    assert objective.evaluate(torch.full((2, 2), INF)).skip_ratio == 1.0
    assert runtime.bounds_in_force is budget
    assert objective.evaluate(budget).skip_ratio == pytest.approx(0.5, abs=0.1)


def test_threads_are_steered_apart(optimized_vlm: nn.Module) -> None:
    batches = [tiny.mixed_batch(seed=1), tiny.text_batch(3, 18, seed=3)]
    modes_fx.set_plan(optimized_vlm, searched(optimized_vlm, batches[0]), 0.5)
    alone = [logits(optimized_vlm, inputs) for inputs in batches]
    start, results = threading.Barrier(2), [[], []]

    def work(index: int) -> None:
        start.wait()
        results[index].extend(logits(optimized_vlm, batches[index]) for _ in range(8))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, many in zip(alone, results, strict=True):
        assert len(many) == 8
        assert all(result.equal(one) for result in many)


def test_the_bare_backend_refuses_a_budget(vlm: nn.Module, plan: SkipPlan) -> None:
    vlm.set_experts_implementation("grouped_mm")
    compiled = torch.compile(vlm, backend="modes_fx", options={"plan": plan})
    with pytest.raises(Exception, match=r"mode 'budget' needs modes_fx\.optimize"):
        logits(compiled, tiny.text_batch(1, 3))


@pytest.mark.usefixtures("without_inductor")
def test_experts_for_one_modality_alone_have_no_budget() -> None:
    model = next(family for family in VISION if family.name == "ernie4_5_vl_moe").build()
    plan = plan_for(torch.rand(len(find_moe_layers(model)), 2, 256))
    with pytest.raises(PlanError, match=r"experts of its own for each modality.*mode=\"fixed\""):
        modes_fx.optimize(model, plan)
    modes_fx.optimize(model, dataclasses.replace(plan, mode="fixed"))
    before = optimized_state(model).runtime.bounds_in_force
    with pytest.raises(PlanError, match=r"experts of its own"):
        modes_fx.set_plan(model, plan)
    assert optimized_state(model).runtime.bounds_in_force.equal(before)
