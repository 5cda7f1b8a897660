"""Outputs besides the logits, which transformers captures by hooks."""

from typing import Any

import pytest
import torch

import modes_fx
from modes_fx.plan import SkipPlan
from tests import tiny
from tests.harness import judged, relative_error

pytestmark = pytest.mark.usefixtures("without_inductor")

PLAN = SkipPlan.uniform(text=0.25, vision=0.4)


ASKED = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}


@pytest.mark.parametrize(
    ("region", "asked"), [("moe", "all"), ("layer", "all"), ("model", "all"), *(("model", name) for name in ASKED)]
)
def test_outputs_asked_for_on_the_first_call_are_those_of_stock(region: Any, asked: str) -> None:
    wanted = ASKED if asked == "all" else {asked: True}
    models = [tiny.make("qwen3_moe"), tiny.make("qwen3_moe")]
    for each in models:
        each.set_attn_implementation("eager")
    stock, model = models
    modes_fx.optimize(model, region=region)
    with torch.no_grad():
        for settings in (wanted, {}, wanted):
            theirs, mine = (each(**tiny.text_batch(), use_cache=False, **settings) for each in (stock, model))
            assert list(mine) == list(theirs)
            assert (mine.logits - theirs.logits).abs().max() <= 1e-4
            for name in ("hidden_states", "attentions", "router_logits"):
                expected, actual = theirs.get(name), mine.get(name)
                assert (actual is None) == (expected is None), name
                for one, other in zip(expected or (), actual or (), strict=True):
                    assert one.shape == other.shape
                    assert (one - other).abs().max() <= 1e-4 * one.abs().max(), name
    assert [site.status for site in modes_fx.report(model).sites] == ["rewritten"] * 2


@pytest.mark.parametrize("region", ["layer", "model"])
def test_a_plan_holds_for_calls_that_ask_for_outputs_too(region: Any) -> None:
    inputs = tiny.text_batch()
    model = tiny.make("qwen3_moe")
    judge = judged(model, inputs, PLAN)
    modes_fx.optimize(model, PLAN, region=region)
    asked = {"output_hidden_states": True, "output_router_logits": True}
    with torch.no_grad():
        for settings in (asked, {}):
            expected, actual = (each(**inputs, use_cache=False, **settings) for each in (judge.model, model))
            assert relative_error(actual.logits, expected.logits, inputs["input_ids"] >= 0) <= 1e-5
            for one, other in zip(expected.get("hidden_states") or (), actual.get("hidden_states") or (), strict=True):
                assert (one - other).abs().max() <= 1e-4
