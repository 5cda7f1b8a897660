"""The bar that speeds are measured against, and what the clock says; no timing is asserted."""

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import modes_fx
from modes_fx.errors import CalibrationError, ModelError
from modes_fx.measure.compare import speed
from modes_fx.measure.compare.speed import SETTINGS, Setting, Stopwatch, settings_of, stock_twin
from modes_fx.models.layers import find_moe_layers
from tests import harness, tiny
from tests.calib.conftest import with_answers
from tests.families.vision import VISION, WRAPPERS
from tests.models.convert.cases import CASES

BATCH = with_answers(4)


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "NEW_TOKENS", 3)
    monkeypatch.setattr(speed, "ROUNDS", 3)
    monkeypatch.setattr(speed, "WARM_UP", 0)
    # What torch.compile makes of stock blocks is torch's business: here the bar runs uncompiled, in every setting.
    monkeypatch.setattr(speed, "_own_caller", lambda: lambda module, *args, **kwargs: module._call_impl(*args, **kwargs))


def ticking(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[nn.Module, int], float]) -> None:
    """Let a clock tell that each step of ``generate`` takes so long; asked with the model and the step."""
    now, model, step = 0.0, None, 0

    def tell(device: torch.device) -> float:
        nonlocal now, model, step
        caller = sys._getframe(1)
        if "model" in caller.f_locals:  # a run begins
            model, step = caller.f_locals["model"], 0
        else:
            now, step = now + seconds(model, step), step + 1
        return now

    monkeypatch.setattr(speed, "now", tell)


def setting_of(model: nn.Module) -> str:
    compiled = any(layer.region(kind)._compiled_call_impl for layer in find_moe_layers(model) for kind in ("moe", "layer"))
    return model.config.text_config._experts_implementation + (" compiled" if compiled else "")


@pytest.mark.usefixtures("without_inductor")
def test_the_bar_is_the_fastest_setting_of_each_phase(vlm: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"eager": (8.0, 1.0), "grouped_mm": (5.0, 4.0), "grouped_mm compiled": (2.0, 3.0), "modes_fx compiled": (1.0, 2.0)}
    ticking(monkeypatch, lambda model, step: times[setting_of(model)][min(step, 1)])
    watch = Stopwatch(vlm, BATCH)
    assert watch.chosen == {"prefill": "grouped_mm, MoE blocks compiled", "decode": "eager"}
    assert watch.facts["stock_ms"]["grouped_mm"] == {"prefill": 5000.0, "decode": 4000.0}
    assert (watch.facts["failed"], watch.facts["batch"]) == ({}, 3)
    modes_fx.optimize(vlm, modes_fx.SkipPlan.uniform(text=0.3, vision=9.0))
    found = watch(vlm)
    assert found.times == {"prefill": 2.0, "decode": 0.5}
    assert found.ranges == {"prefill": (2.0, 2.0), "decode": (0.5, 0.5)}
    assert 0 < found.skipped["decode"] < found.skipped["prefill"] < 1  # the images' tokens skip all
    again = Stopwatch(vlm, BATCH, watch.chosen)
    assert again.chosen == watch.chosen
    assert "stock_ms" not in again.facts


@pytest.mark.usefixtures("without_inductor")
def test_where_generate_compiles_a_static_cache_both_sides_decode_over_one(
    vlm: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[str | None] = []
    generate = type(vlm).generate

    def noting(self: nn.Module, **settings: object) -> object:
        caches.append(settings.get("cache_implementation"))
        return generate(self, **settings)

    monkeypatch.setattr(type(vlm), "generate", noting)
    monkeypatch.setattr(speed, "compiles_itself", lambda model: True)
    monkeypatch.setattr(speed, "SETTINGS", (Setting("grouped_mm"),))
    times = {None: (2.0, 8.0), "static": (4.0, 1.0)}
    ticking(monkeypatch, lambda model, step: times[caches[-1]][min(step, 1)] / (2 if hasattr(model, "_modes_fx") else 1))
    watch = Stopwatch(vlm, BATCH)
    assert watch.chosen == {"prefill": "grouped_mm", "decode": "grouped_mm, static cache compiled"}
    assert watch(modes_fx.optimize(vlm)).times == {"prefill": 2.0, "decode": 2.0}
    assert Stopwatch(vlm, BATCH, watch.chosen).chosen == watch.chosen


@pytest.mark.usefixtures("without_inductor")
def test_a_time_that_was_not_measured_is_no_number(vlm: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "NEW_TOKENS", 0)  # one token: there is no step from one to the next
    watch = Stopwatch(vlm, BATCH)
    modes_fx.optimize(vlm)
    found = watch(vlm)
    assert found.times["prefill"] > 0
    assert math.isnan(found.times["decode"])
    assert all(math.isnan(end) for end in found.ranges["decode"])
    assert math.isnan(found.skipped["decode"])


@pytest.mark.usefixtures("without_inductor")
def test_a_step_in_no_time_at_all_is_not_infinitely_fast(vlm: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    ticking(monkeypatch, lambda model, step: 0.0 if hasattr(model, "_modes_fx") else 1.0)
    watch = Stopwatch(vlm, BATCH)
    assert all(math.isnan(ratio) for ratio in watch(modes_fx.optimize(vlm)).times.values())


def test_a_setting_that_does_not_run_is_told_and_left_out(vlm: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SETTINGS", (Setting("eager"), Setting("no_such"), Setting("grouped_mm", "layer")))

    def broken() -> Callable[..., object]:
        def call(module: nn.Module, *args: object, **kwargs: object) -> object:
            raise RuntimeError("no compiler\nand more")

        return call

    monkeypatch.setattr(speed, "_own_caller", broken)
    monkeypatch.setattr(speed, "WARM_UP", 1)
    watch = Stopwatch(vlm, BATCH)
    assert set(watch.chosen.values()) == {"eager"}
    assert watch.facts["failed"]["grouped_mm, decoder layers compiled"] == "RuntimeError: no compiler"
    assert "no_such" in watch.facts["failed"]["no_such"]
    monkeypatch.setattr(speed, "SETTINGS", (Setting("no_such"),))
    with pytest.raises(CalibrationError, match="No stock setting"):
        Stopwatch(vlm, BATCH)


def test_twins_share_weights_and_leave_the_model_as_it_was(vlm: nn.Module) -> None:
    before = harness.model_state(vlm)
    wanted = harness.logits(vlm, tiny.mixed_batch())
    for setting in SETTINGS:
        twin = stock_twin(vlm, setting)
        assert [id(weight) for weight in twin.parameters()] == [id(weight) for weight in vlm.parameters()]
        torch.testing.assert_close(harness.logits(twin, tiny.mixed_batch()), wanted)
    assert harness.model_state(vlm) == before


@pytest.mark.parametrize("name", ["internvl-qwen3_moe", "kimi_k25"])
def test_a_text_model_takes_settings_that_the_class_around_it_refuses(name: str) -> None:
    model: Any = next(family for family in (*VISION, *WRAPPERS) if family.name == name).build()
    with pytest.raises(ValueError, match="does not support setting experts"):
        model.set_experts_implementation("grouped_mm")
    assert settings_of(model) == SETTINGS
    for experts in ("eager", "grouped_mm"):
        twin: Any = stock_twin(model, Setting(experts))
        assert {layer.experts.config._experts_implementation for layer in find_moe_layers(twin)} == {experts}


def test_a_model_of_other_dispatch_is_timed_as_it_was_loaded() -> None:
    model = CASES["deepseek"].make()
    with pytest.raises(ModelError, match="cannot be chosen"):
        stock_twin(model, Setting("eager"))
    settings = settings_of(model)
    assert [str(setting) for setting in settings] == [
        "as loaded", "as loaded, MoE blocks compiled", "as loaded, decoder layers compiled",
        "as loaded, all layers as one compiled",
    ]  # fmt: skip
