"""Bad input to optimize: an error that names the thing and the next step, and a model left as it was."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.config
import torch._inductor.config
from torch import nn

import modes_fx
from modes_fx import errors
from modes_fx.errors import (
    CompilerError,
    ModelError,
    ModesFxError,
    NoRoutingSiteError,
    NotOptimizedError,
    PlanError,
)
from modes_fx.plan import PlanPoint, SkipPlan, describe_model
from tests import oracle, tiny
from tests.harness import logits, model_state

PLAN = SkipPlan((PlanPoint(0.5, 0.1, 0.1),))


def refused(model: nn.Module, *args: Any, error: type[ModesFxError], match: str, **options: Any) -> None:
    """Assert that optimize fails, and that nothing of the model changed."""
    before, inputs = model_state(model), tiny.text_batch()
    stock = logits(model, inputs)
    with pytest.raises(error, match=match):
        modes_fx.optimize(model, *args, **options)
    assert model_state(model) == before
    assert logits(model, inputs).equal(stock)
    with pytest.raises(NotOptimizedError):
        modes_fx.report(model)


@pytest.fixture(scope="module")
def shared() -> nn.Module:
    """One model for all failures, since each leaves it as it was."""
    model = tiny.make()
    model.set_experts_implementation("eager")
    return model


def test_every_error_is_a_modes_fx_error_and_has_a_docstring() -> None:
    for _, kind in inspect.getmembers(errors, inspect.isclass):
        assert issubclass(kind, ModesFxError)
        assert kind.__doc__


def test_a_plan_for_another_model(shared: nn.Module) -> None:
    foreign = SkipPlan(PLAN.points, model=describe_model(tiny.make("mixtral").config))
    refused(shared, foreign, error=PlanError, match=r"another model: mixtral.*qwen3_vl_moe.*Calibrate")


def test_a_plan_with_importances_of_other_layers(shared: nn.Module) -> None:
    refused(shared, SkipPlan(PLAN.points, ((0.5, 0.5),) * 3), error=PlanError, match="3 MoE layers, the model has 2")


def test_an_unknown_target(shared: nn.Module) -> None:
    refused(shared, PLAN, target=0.6, error=PlanError, match=r"no target 0\.6; its targets: 0\.5")


def test_a_target_without_a_plan(shared: nn.Module) -> None:
    refused(shared, target=0.5, error=PlanError, match="needs a plan")


def test_a_missing_plan_file(shared: nn.Module, tmp_path: Path) -> None:
    refused(shared, tmp_path / "plan.json", error=PlanError, match=r"plan\.json: No such file.*Make one")


def test_a_truncated_plan_file(shared: nn.Module, tmp_path: Path) -> None:
    path = PLAN.save(tmp_path / "plan.json")
    path.write_text(path.read_text()[:40])
    refused(shared, str(path), error=PlanError, match=r"plan\.json is not a whole JSON file")


@pytest.mark.parametrize("option", ["region", "dispatch"])
def test_an_unknown_region_or_dispatch(shared: nn.Module, option: str) -> None:
    refused(shared, error=ModesFxError, match=f"Unknown {option} 'all'; known: ", **{option: "all"})


def test_a_model_without_moe_blocks() -> None:
    refused(tiny.dense(), error=NoRoutingSiteError, match="LlamaForCausalLM has no MoE layer")


def test_something_that_is_no_model() -> None:
    with pytest.raises(ModelError, match="str"):
        modes_fx.optimize("a model")


def test_a_model_whose_sites_are_all_refused_says_how_many_and_why(shared: nn.Module) -> None:
    for experts in oracle.experts_of(shared):
        experts._is_expert_parallel = True
    try:
        refused(shared, PLAN, error=NoRoutingSiteError, match=r"2 found, 2 rejected \(2 x EXPERT_PARALLEL\)")
    finally:
        for experts in oracle.experts_of(shared):
            experts._is_expert_parallel = False


def test_one_refused_site_leaves_the_other_rewritten_and_is_reported() -> None:
    model = tiny.make()
    oracle.experts_of(model)[0]._is_expert_parallel = True
    modes_fx.optimize(model)
    report = modes_fx.report(model)
    assert [(site.status, site.code) for site in report.sites] == [("rejected", "EXPERT_PARALLEL"), ("rewritten", "")]
    assert report.reasons() == "1 x EXPERT_PARALLEL"


def test_no_compiler_for_inductor(shared: nn.Module) -> None:
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        refused(shared, PLAN, error=CompilerError, match=r"C\+\+ compiler.*g\+\+.*CXX")


@pytest.mark.parametrize(
    ("off", "by"),
    [
        (lambda: torch._dynamo.config.patch(disable=True), "TORCH_COMPILE_DISABLE"),
        (lambda: torch.compiler.set_stance("force_eager"), "force_eager"),
    ],
)
def test_where_torch_compile_is_switched_off_nothing_is_optimised_or_inspected(shared: nn.Module, off: Any, by: str) -> None:
    with off():
        refused(shared, PLAN, error=CompilerError, match=by)
        with pytest.raises(CompilerError, match=by):
            modes_fx.inspect(shared)


def test_a_failure_in_the_middle_leaves_the_model_as_it_was(shared: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from modes_fx.graph.runtime import Runtime

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    before = model_state(shared)
    monkeypatch.setattr(Runtime, "set_bounds", interrupted)  # the last step
    with pytest.raises(KeyboardInterrupt):
        modes_fx.optimize(shared, PLAN)
    assert model_state(shared) == before


@pytest.mark.usefixtures("without_inductor")
def test_a_refused_second_optimize_leaves_the_first_in_force(vlm: nn.Module) -> None:
    inputs = tiny.mixed_batch()
    planned = logits(modes_fx.optimize(vlm, SkipPlan.uniform(text=0.3, vision=0.3)), inputs)
    for bad in ({"target": 0.6}, {"region": "all"}):
        with pytest.raises(ModesFxError):
            modes_fx.optimize(vlm, PLAN, **bad)
        assert logits(vlm, inputs).equal(planned)


def test_functions_of_an_optimised_model_refuse_a_stock_one(shared: nn.Module) -> None:
    for function in (modes_fx.restore, modes_fx.report, modes_fx.stats, lambda model: modes_fx.set_plan(model, None)):
        with pytest.raises(NotOptimizedError, match=r"Qwen3VLMoe.*modes_fx\.optimize"):
            function(shared)
