"""optimize, restore, set_plan, report and stats on a tiny real model; graphs are rewritten and run without Inductor."""

import contextlib
import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import modes_fx
from modes_fx.errors import ModelError, NotOptimizedError, PlanError
from modes_fx.optimize import optimized_state
from modes_fx.plan import PlanPoint, SkipPlan, describe_model
from tests import oracle, tiny
from tests.harness import logits, model_state, plan_of, relative_error

pytestmark = pytest.mark.usefixtures("without_inductor")

PLAN = SkipPlan.uniform(text=0.25, vision=0.4)


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return tiny.mixed_batch(seed=5)


def rotating_bounds(model: nn.Module, inputs: dict[str, Tensor], seed: int) -> Tensor:
    return oracle.random_bounds(model, tiny.classes(inputs), seed=seed, **inputs)


def test_the_same_object_comes_back_and_its_report_names_each_site(vlm: nn.Module) -> None:
    assert modes_fx.optimize(vlm) is vlm
    report = modes_fx.report(vlm)
    assert (report.model, report.region, report.found) == ("Qwen3VLMoeForConditionalGeneration", "moe", 2)
    assert [site.name for site in report.sites] == [f"model.language_model.layers.{i}.mlp.experts" for i in range(2)]
    assert {(s.status, s.dispatch, s.form, s.top_k, s.num_experts) for s in report.sites} == {
        ("rewritten", "compact", "grouped_mm", 3, 6)
    }
    assert report.graphs == 0  # nothing is compiled before the first call


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_restore_brings_back_everything(vlm: nn.Module, inputs: dict[str, Tensor], implementation: str) -> None:
    vlm.set_experts_implementation(implementation)
    before, stock = model_state(vlm), logits(vlm, inputs)
    modes_fx.optimize(vlm, PLAN)
    assert not logits(vlm, inputs).equal(stock)
    assert modes_fx.restore(vlm) is vlm
    assert model_state(vlm) == before
    assert logits(vlm, inputs).equal(stock)
    with pytest.raises(NotOptimizedError, match=r"modes_fx\.optimize"):
        modes_fx.restore(vlm)


@pytest.mark.parametrize(("region", "seed"), [("moe", 0), ("layer", 1), ("model", 2)])
def test_random_thresholds_give_the_oracles_logits_and_counts(
    vlm: nn.Module, inputs: dict[str, Tensor], region: str, seed: int
) -> None:
    bounds, classes = rotating_bounds(vlm, inputs, seed), tiny.classes(inputs)
    wanted = oracle.Oracle(vlm, bounds)
    expected = wanted(classes, **inputs, use_cache=False).logits
    modes_fx.optimize(vlm, plan_of(bounds), region=region)
    with modes_fx.stats(vlm) as stats:
        actual = logits(vlm, inputs)
    assert relative_error(actual, expected, classes != 2) <= 2e-5
    assert stats.pairs_routed.equal(wanted.routed)
    assert stats.pairs_kept.equal(wanted.kept)
    assert [site.status for site in modes_fx.report(vlm).sites] == ["rewritten"] * 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_thresholds_of_zero_leave_the_logits_of_real_tokens_alone(vlm: nn.Module, side: str) -> None:
    inputs = tiny.mixed_batch(side=side)
    stock = logits(vlm, inputs)
    for plan in (None, SkipPlan.uniform(text=0.0, vision=0.0)):
        modes_fx.optimize(vlm, plan)
        assert relative_error(logits(vlm, inputs), stock, tiny.classes(inputs) != 2) <= 1e-5


def test_infinite_thresholds_skip_all_experts(optimized_vlm: nn.Module, inputs: dict[str, Tensor]) -> None:
    modes_fx.set_plan(optimized_vlm, SkipPlan.uniform(text=float("inf"), vision=float("inf")))
    bare = tiny.make()
    for experts in oracle.experts_of(bare):
        experts.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    with modes_fx.stats(optimized_vlm) as stats:
        actual = logits(optimized_vlm, inputs)
    assert relative_error(actual, logits(bare, inputs), tiny.classes(inputs) != 2) <= 1e-5
    assert stats.skip_ratio() == 1.0


def generate_by_hand(forward: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Run a prefill and two decode steps of fixed tokens; ``forward(classes, phase, **arguments)``."""
    out = forward(tiny.classes(inputs), 0, **inputs)
    results, mask = [out.logits[:, -1]], inputs["attention_mask"]
    for step, ids in enumerate([torch.tensor([[5], [6], [7]]), torch.tensor([[8], [9], [10]])]):
        mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
        position_ids, cache = torch.full((3, 3, 1), 18 + step), out.past_key_values
        classes = torch.zeros_like(ids)
        out = forward(classes, 1, input_ids=ids, past_key_values=cache, attention_mask=mask, position_ids=position_ids)
        results.append(out.logits[:, -1])
    return results


@pytest.mark.parametrize("decode_tau", [1.0, 2.0], ids=["one target", "another target for decoding"])
def test_stats_equal_the_oracles_over_prefill_and_decoding(
    optimized_vlm: nn.Module, inputs: dict[str, Tensor], decode_tau: float
) -> None:
    bounds = rotating_bounds(tiny.make(), inputs, seed=4)
    wanted = oracle.Oracle(tiny.make(), bounds)

    def expected_forward(classes: Tensor, phase: int, **arguments: Any) -> Any:
        wanted.bounds = bounds * decode_tau if phase else bounds
        return wanted(classes, phase, **arguments)

    def optimized(classes: Tensor, phase: int, **arguments: Any) -> Any:
        with torch.no_grad():
            return optimized_vlm(**arguments)

    expected = generate_by_hand(expected_forward, inputs)
    points = (PlanPoint(0.3, decode_tau, decode_tau), PlanPoint(0.6, 1.0, 1.0))
    modes_fx.set_plan(optimized_vlm, replace(plan_of(bounds), points=points), decode_target=0.3)
    with modes_fx.stats(optimized_vlm) as stats:
        actual = generate_by_hand(optimized, inputs)
    for mine, theirs in zip(actual, expected, strict=True):
        assert relative_error(mine, theirs, torch.ones(3, dtype=torch.bool)) <= 2e-5
    assert stats.pairs_routed.equal(wanted.routed)
    assert stats.pairs_kept.equal(wanted.kept)
    assert int(wanted.kept[:, :, 1].sum()) < int(wanted.routed[:, :, 1].sum())


def test_either_target_changes_without_recompilation_and_for_its_phase_alone(
    optimized_vlm: nn.Module, inputs: dict[str, Tensor]
) -> None:
    plan = SkipPlan((PlanPoint(0.0, 0.0, 0.0), PlanPoint(1.0, float("inf"), float("inf"))))
    modes_fx.set_plan(optimized_vlm, plan)

    def ratios() -> tuple[float, float]:
        with modes_fx.stats(optimized_vlm).reset() as stats:
            optimized_vlm.generate(**inputs, max_new_tokens=4, do_sample=False)
        return stats.skip_ratio(phase="prefill"), stats.skip_ratio(phase="decode")

    assert ratios() == (1.0, 1.0)
    graphs = modes_fx.report(optimized_vlm).graphs
    for target in (0.0, 1.0):
        for decode_target in (0.0, 1.0):
            modes_fx.set_plan(optimized_vlm, plan, target, decode_target=decode_target)
            assert ratios() == (target, decode_target)
    modes_fx.set_plan(optimized_vlm, plan, 0.0)
    assert ratios() == (0.0, 0.0)
    assert modes_fx.report(optimized_vlm).graphs == graphs


def test_a_refused_decode_target_leaves_the_old_plan_in_force(optimized_vlm: nn.Module) -> None:
    modes_fx.set_plan(optimized_vlm, PLAN)
    with pytest.raises(PlanError, match=r"no target 0\.5"):
        modes_fx.set_plan(optimized_vlm, SkipPlan((PlanPoint(0.3, 0.1, 0.1),)), 0.3, decode_target=0.5)
    with pytest.raises(PlanError, match="decode_target"):
        modes_fx.set_plan(optimized_vlm, None, decode_target=0.5)
    assert optimized_state(optimized_vlm).runtime.bounds_in_force.equal(PLAN.bounds(2))


def test_statistics_are_off_until_asked_for_and_can_be_reset(optimized_vlm: nn.Module, inputs: dict[str, Tensor]) -> None:
    modes_fx.set_plan(optimized_vlm, PLAN)
    stats = modes_fx.stats(optimized_vlm)
    logits(optimized_vlm, inputs)
    assert not stats.recording
    assert int(stats.pairs_routed.sum()) == 0
    with stats:
        logits(optimized_vlm, inputs)
    once = stats.pairs_kept
    logits(optimized_vlm, inputs)
    assert stats.pairs_kept.equal(once)
    with stats:
        logits(optimized_vlm, inputs)
    assert stats.pairs_kept.equal(2 * once)
    assert int(stats.reset().pairs_kept.sum()) == 0
    assert modes_fx.stats(optimized_vlm) is stats


def test_switching_plans_and_30_generated_tokens_compile_two_graphs(vlm: nn.Module, inputs: dict[str, Tensor]) -> None:
    plan = SkipPlan((PlanPoint(0.2, 0.1, 0.2), PlanPoint(0.6, 0.3, 0.4)), ((0.9, 1.0), (1.0, 0.8)))
    counters.clear()
    modes_fx.optimize(vlm, plan, target=0.2)
    probed = counters["stats"]["unique_graphs"]
    vlm.generate(**inputs, max_new_tokens=30, do_sample=False)
    assert counters["stats"]["unique_graphs"] - probed <= 2
    assert modes_fx.report(vlm).graphs <= 2
    after_first = counters["stats"]["unique_graphs"]
    for change in (
        (plan, 0.6),
        (PLAN, None),
        (None, None),
        (SkipPlan.uniform(text=float("inf"), vision=0.0), None),
        (plan, 0.2),
    ):
        assert modes_fx.set_plan(vlm, *change) is vlm
        vlm.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert counters["stats"]["unique_graphs"] == after_first


def test_batches_of_ever_new_sizes_end_in_a_few_graphs(vlm: nn.Module) -> None:
    modes_fx.optimize(vlm, PLAN)
    for rows, length in ((2, 9), (1, 7), (3, 5)):
        logits(vlm, tiny.text_batch(rows, length))
    graphs = modes_fx.report(vlm).graphs
    assert graphs <= 3  # the first sizes, one sequence of any length, any sizes
    for rows, length in ((1, 12), (4, 4), (5, 7), (1, 30), (2, 31)):
        logits(vlm, tiny.text_batch(rows, length))
    assert modes_fx.report(vlm).graphs == graphs


def test_set_plan_takes_effect_at_once_and_none_keeps_all(optimized_vlm: nn.Module, inputs: dict[str, Tensor]) -> None:
    plain = logits(optimized_vlm, inputs)
    modes_fx.set_plan(optimized_vlm, PLAN)
    planned = logits(optimized_vlm, inputs)
    assert not planned.equal(plain)
    modes_fx.set_plan(optimized_vlm, None)
    assert logits(optimized_vlm, inputs).equal(plain)
    modes_fx.set_plan(optimized_vlm, PLAN)
    assert logits(optimized_vlm, inputs).equal(planned)


def test_a_plan_may_come_from_a_file(vlm: nn.Module, inputs: dict[str, Tensor], tmp_path: Any) -> None:
    path = PLAN.save(tmp_path / "plan.json")
    by_path = logits(modes_fx.optimize(vlm, str(path)), inputs)
    assert by_path.equal(logits(modes_fx.set_plan(vlm, PLAN), inputs))


def test_a_refused_plan_leaves_the_old_one_in_force(optimized_vlm: nn.Module, inputs: dict[str, Tensor]) -> None:
    planned = logits(modes_fx.set_plan(optimized_vlm, PLAN), inputs)
    foreign = SkipPlan(PLAN.points, model=describe_model(tiny.make("mixtral").config))
    for plan, target in (
        (foreign, None),
        (PLAN, 0.5),
        (SkipPlan(PLAN.points, ((1.0, 1.0),)), None),
        (SkipPlan.reduce_k(1), None),
    ):
        with pytest.raises(PlanError):
            modes_fx.set_plan(optimized_vlm, plan, target)
        assert logits(optimized_vlm, inputs).equal(planned)


def test_reduce_k_equals_the_oracles(vlm: nn.Module, inputs: dict[str, Tensor]) -> None:
    classes = tiny.classes(inputs)
    wanted = oracle.Oracle(vlm, torch.ones(2, 2), keep=oracle.largest)
    expected = wanted(classes, **inputs, use_cache=False).logits
    modes_fx.optimize(vlm, SkipPlan.reduce_k(1))
    with modes_fx.stats(vlm) as stats:
        assert relative_error(logits(vlm, inputs), expected, classes != 2) <= 2e-5
    assert stats.pairs_kept.equal(wanted.kept)
    assert stats.skip_ratio() == pytest.approx(2 / 3)


def test_optimising_twice_starts_anew_and_restores_to_stock(vlm: nn.Module, inputs: dict[str, Tensor]) -> None:
    before, stock = model_state(vlm), logits(vlm, inputs)
    modes_fx.optimize(vlm, PLAN)
    planned = logits(vlm, inputs)
    modes_fx.optimize(vlm, SkipPlan.uniform(text=1.0, vision=1.0), dispatch="static")
    assert {site.dispatch for site in modes_fx.report(vlm).sites} == {"static"}
    assert not logits(vlm, inputs).equal(planned)
    modes_fx.restore(vlm)
    assert model_state(vlm) == before
    assert logits(vlm, inputs).equal(stock)


def test_two_models_keep_their_own_thresholds(vlm: nn.Module, inputs: dict[str, Tensor]) -> None:
    other = modes_fx.optimize(tiny.make(), PLAN)
    planned = logits(other, inputs)
    stock = logits(vlm, inputs)
    modes_fx.optimize(vlm)
    logits(vlm, inputs)
    assert logits(other, inputs).equal(planned)
    modes_fx.restore(other)
    assert relative_error(logits(vlm, inputs), stock, tiny.classes(inputs) != 2) <= 1e-5


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_a_copy_of_an_optimised_model_is_a_stock_model(vlm: nn.Module, inputs: dict[str, Tensor], duplicate: Any) -> None:
    stock, hooks = logits(vlm, inputs), model_state(vlm)["hooks"]
    modes_fx.optimize(vlm, PLAN)
    planned = logits(vlm, inputs)
    twin = duplicate(vlm)
    assert logits(twin, inputs).equal(stock)
    assert model_state(twin)["hooks"] == hooks
    for call in (modes_fx.stats, modes_fx.report, modes_fx.restore, lambda model: modes_fx.set_plan(model, None)):
        with pytest.raises(NotOptimizedError, match="not optimised"):
            call(twin)
    assert logits(vlm, inputs).equal(planned)
    assert logits(modes_fx.optimize(twin, PLAN), inputs).equal(planned)


def test_a_pickle_runs_in_a_process_that_did_not_import_modes_fx(vlm: nn.Module, tmp_path: Path) -> None:
    modes_fx.optimize(vlm, PLAN)
    with (tmp_path / "model.pkl").open("wb") as file:
        pickle.dump(vlm, file)
    code = (
        f"import pickle, torch; model = pickle.load(open({str(tmp_path / 'model.pkl')!r}, 'rb')); model(torch.tensor([[5, 6]]))"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True)


def test_weights_loaded_in_place_are_used(vlm: nn.Module, inputs: dict[str, Tensor]) -> None:
    modes_fx.optimize(vlm)
    logits(vlm, inputs)
    other = tiny.make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    vlm.load_state_dict(other.state_dict())
    assert relative_error(logits(vlm, inputs), logits(other, inputs), tiny.classes(inputs) != 2) <= 1e-5


def test_a_region_that_is_the_model_itself_is_told_its_modality() -> None:
    headless = tiny.make("qwen3_moe").model
    inputs = tiny.text_batch()
    before = model_state(headless)
    with torch.no_grad():
        stock = headless(**inputs).last_hidden_state
        modes_fx.optimize(headless, SkipPlan.uniform(text=0.0, vision=1.0), region="model")
        with modes_fx.stats(headless) as stats:
            kept = headless(**inputs).last_hidden_state
        modes_fx.restore(headless)
    assert torch.allclose(kept, stock, rtol=1e-5, atol=1e-5)
    assert stats.skip_ratio(modality="text") == 0
    assert model_state(headless) == before


@pytest.mark.parametrize("form", ["batched_mm", "eager"])
def test_a_dispatch_that_is_switched_afterwards_is_refused_by_name(
    vlm: nn.Module, inputs: dict[str, Tensor], form: str
) -> None:
    stock = logits(vlm, inputs)
    modes_fx.optimize(vlm, PLAN)
    planned = logits(vlm, inputs)
    vlm.set_experts_implementation(form)
    with pytest.raises(ModelError, match=f"set to '{form}' after optimize"):
        logits(vlm, inputs)
    modes_fx.set_plan(vlm, None)  # nothing is to be skipped: it is obeyed
    assert relative_error(logits(vlm, inputs), stock, tiny.classes(inputs) != 2) <= 1e-5
    assert logits(modes_fx.optimize(vlm, PLAN), inputs).equal(planned)
    vlm.set_experts_implementation(form)
    modes_fx.restore(vlm)
    assert set(vlm.get_experts_implementation().values()) == {form}
    assert not logits(vlm, inputs).equal(planned)


def test_generate_leaves_the_dispatch_of_optimised_experts_alone(
    vlm: nn.Module, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off the CPU, generate decodes with batched_mm where a config names grouped_mm: the parent's, but not the experts'."""
    stock = vlm.generate(**inputs, max_new_tokens=4, do_sample=False)
    seen: list[dict[str, str]] = []

    @contextlib.contextmanager
    def switch(model: nn.Module) -> Iterator[None]:  # as transformers does it where the model's device is not the CPU
        before = model.get_experts_implementation()
        seen.append({key: "batched_mm" if name == "grouped_mm" else name for key, name in before.items()})
        model.set_experts_implementation(seen[-1])
        yield
        model.set_experts_implementation(before)

    monkeypatch.setattr(type(vlm), "_optimize_model_for_decode", switch)
    modes_fx.optimize(vlm)
    assert vlm.generate(**inputs, max_new_tokens=4, do_sample=False).equal(stock)
    assert seen[0] == {"": "batched_mm", "vision_config": "batched_mm", "text_config": "modes_fx"}
    assert [site.form for site in modes_fx.report(vlm).sites] == ["grouped_mm"] * 2
    assert modes_fx.report(vlm).graphs == 2  # prefill and decoding
