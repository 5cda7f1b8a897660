"""The bar that speeds are measured against, and what the clock says; no timing is asserted."""

import math
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

import modes_fx
from modes_fx.errors import CalibrationError
from modes_fx.measure import twins
from modes_fx.measure.compare import compare, speed
from modes_fx.measure.compare.speed import Stopwatch
from modes_fx.measure.twins import OURS, Setting
from modes_fx.models.layers import Region, find_moe_layers
from modes_fx.optimize import is_optimized
from tests import tiny
from tests.calib.conftest import with_answers
from tests.models.convert.cases import CASES

BATCH = with_answers(4)


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "NEW_TOKENS", 3)
    monkeypatch.setattr(speed, "ROUNDS", 3)
    monkeypatch.setattr(speed, "WARM_UP", 0)
    # What torch.compile makes of stock blocks is torch's business: here the bar runs uncompiled, in every setting.
    monkeypatch.setattr(twins, "_own_caller", lambda: lambda module, *args, **kwargs: module._call_impl(*args, **kwargs))


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
    if is_optimized(model):
        return modes_fx.report(model).region
    compiled = any(layer.region(kind)._compiled_call_impl for layer in find_moe_layers(model) for kind in ("moe", "layer"))
    return model.config.get_text_config()._experts_implementation + (" compiled" if compiled else "")


def few(monkeypatch: pytest.MonkeyPatch, region: Region = "moe") -> None:
    """Leave one setting of each side, beside the static one."""
    monkeypatch.setattr(twins, "STOCK_SETTINGS", (Setting("grouped_mm"),))
    monkeypatch.setattr(twins, "OUR_SETTINGS", (Setting(OURS, region),))


PLAN = modes_fx.SkipPlan.uniform(text=0.3, vision=9.0)


@pytest.mark.usefixtures("without_inductor")
def test_each_side_is_timed_in_its_fastest_setting_of_each_phase(vlm: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {
        "eager": (8.0, 1.0), "grouped_mm": (5.0, 4.0), "grouped_mm compiled": (2.0, 3.0),
        "moe": (4.0, 2.0), "layer": (1.0, 9.0),
    }  # fmt: skip
    monkeypatch.setattr(twins, "OUR_SETTINGS", (Setting(OURS, "moe"), Setting(OURS, "layer")))
    ticking(monkeypatch, lambda model, step: times[setting_of(model)][min(step, 1)])
    watch = Stopwatch(vlm, BATCH)
    assert watch.facts["fastest"] == {"prefill": "grouped_mm, MoE blocks compiled", "decode": "eager"}
    assert watch.facts["ours"] == {"prefill": 'modes-fx, region="layer"', "decode": "modes-fx"}
    assert watch.facts["stock_ms"]["grouped_mm"] == {"prefill": 5000.0, "decode": 4000.0}
    assert watch.facts["ours_times"]["modes-fx"] == {"prefill": 0.5, "decode": 0.5}
    assert (watch.facts["failed"], watch.facts["batch"]) == ({}, 3)
    assert not is_optimized(vlm)
    watch.optimize(vlm, 'modes-fx, region="layer"', PLAN)
    found = watch(vlm, 'modes-fx, region="layer"')
    assert found.times == {"prefill": 2.0, "decode": 1 / 9}
    assert found.ranges == {"prefill": (2.0, 2.0), "decode": (1 / 9, 1 / 9)}
    assert 0 < found.skipped["decode"] < found.skipped["prefill"] < 1  # the images' tokens skip all
    modes_fx.restore(vlm)
    assert Stopwatch(vlm, BATCH, watch.facts).facts == watch.facts


@pytest.mark.wide
@pytest.mark.usefixtures("without_inductor")
def test_a_converted_model_whose_weights_move_is_timed_in_each_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twins, "OUR_SETTINGS", (Setting(OURS, "moe"), Setting(OURS, "layer")))
    phases = {"prefill": "layer", "decode": "moe"}  # the faster region of each
    ticking(monkeypatch, lambda model, step: 1.0 if setting_of(model) == list(phases.values())[min(step, 1)] else 2.0)
    inputs = tiny.text_batch()
    data = [{**inputs, "labels": inputs["input_ids"].where(torch.arange(inputs["input_ids"].shape[1]) > 6, -100)}]
    found = compare(CASES["deepseek"].make(), data, data, (0.5,), ("threshold", "reduce_k"), timed=True)
    assert found.timing["ours"] == {"prefill": 'modes-fx, region="layer"', "decode": "modes-fx"}
    assert [row.speed for row in found.rows] == [{"prefill": 2.0, "decode": 2.0}] * 2


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
    monkeypatch.setattr(twins, "compiles_itself", lambda model: True)
    few(monkeypatch)
    times = {None: (2.0, 8.0), "static": (4.0, 1.0)}
    ticking(monkeypatch, lambda model, step: times[caches[-1]][min(step, 1)] / (2 if hasattr(model, "_modes_fx") else 1))
    watch = Stopwatch(vlm, BATCH)
    assert watch.facts["fastest"] == {"prefill": "grouped_mm", "decode": "grouped_mm, static cache compiled"}
    assert watch.facts["ours"] == {"prefill": "modes-fx", "decode": "modes-fx, static cache compiled"}
    watch.optimize(vlm, "modes-fx, static cache compiled", PLAN)
    assert watch(vlm, "modes-fx, static cache compiled").times == {"prefill": 1.0, "decode": 2.0}


@pytest.mark.usefixtures("without_inductor")
def test_a_time_that_was_not_measured_is_no_number(vlm: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    monkeypatch.setattr(speed, "NEW_TOKENS", 0)  # one token: there is no step from one to the next
    found = Stopwatch(vlm, BATCH)(modes_fx.optimize(vlm), "modes-fx")
    assert found.times["prefill"] > 0
    assert math.isnan(found.times["decode"])
    assert all(math.isnan(end) for end in found.ranges["decode"])
    assert math.isnan(found.skipped["decode"])


@pytest.mark.usefixtures("without_inductor")
def test_a_step_in_no_time_at_all_is_not_infinitely_fast(vlm: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    ticking(monkeypatch, lambda model, step: 0.0 if hasattr(model, "_modes_fx") else 1.0)
    assert all(math.isnan(ratio) for ratio in Stopwatch(vlm, BATCH)(modes_fx.optimize(vlm), "modes-fx").times.values())


@pytest.mark.usefixtures("without_inductor")
def test_a_setting_that_does_not_run_is_told_and_left_out(
    vlm: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = (Setting("eager"), Setting("no_such"), Setting("grouped_mm", "layer"))
    monkeypatch.setattr(twins, "STOCK_SETTINGS", settings)
    monkeypatch.setattr(twins, "OUR_SETTINGS", (Setting(OURS, "moe"),))

    def broken() -> Callable[..., object]:
        def call(module: nn.Module, *args: object, **kwargs: object) -> object:
            raise RuntimeError("no compiler\nand more")

        return call

    monkeypatch.setattr(twins, "_own_caller", broken)
    monkeypatch.setattr(speed, "WARM_UP", 1)
    watch = Stopwatch(vlm, BATCH)
    assert set(watch.facts["fastest"].values()) == {"eager"}
    assert watch.facts["failed"]["grouped_mm, decoder layers compiled"] == "RuntimeError: no compiler"
    assert "no_such" in watch.facts["failed"]["no_such"]
    assert "grouped_mm, decoder layers compiled does not run, and is not timed: RuntimeError: no compiler" in caplog.text
    gone = {**watch.facts, "fastest": {"prefill": "eager", "decode": "no_such_either"}}
    with pytest.raises(CalibrationError, match="no_such_either: no setting of this model"):
        Stopwatch(vlm, BATCH, gone)
    monkeypatch.setattr(twins, "STOCK_SETTINGS", (Setting("no_such"),))
    with pytest.raises(CalibrationError, match="No stock setting of Qwen3VLMoe"):
        Stopwatch(vlm, BATCH)
