"""Copies of a model in the settings that users have."""

from typing import Any

import pytest
import torch
from torch import nn

from modes_fx.errors import ModelError
from modes_fx.measure.twins import OURS, STOCK_SETTINGS, Setting, our_settings, stock_settings, stock_twin
from modes_fx.models.layers import find_moe_layers
from tests import harness, tiny
from tests.families.vision import VISION, WRAPPERS
from tests.models.convert.cases import CASES


def test_twins_share_weights_and_leave_the_model_as_it_was(vlm: nn.Module) -> None:
    before = harness.model_state(vlm)
    wanted = harness.logits(vlm, tiny.mixed_batch())
    for setting in STOCK_SETTINGS:
        twin = stock_twin(vlm, setting)
        assert [id(weight) for weight in twin.parameters()] == [id(weight) for weight in vlm.parameters()]
        torch.testing.assert_close(harness.logits(twin, tiny.mixed_batch()), wanted)
    assert harness.model_state(vlm) == before


@pytest.mark.parametrize("name", ["internvl-qwen3_moe", "kimi_k25"])
def test_a_text_model_takes_settings_that_the_class_around_it_refuses(name: str) -> None:
    model: Any = next(family for family in (*VISION, *WRAPPERS) if family.name == name).build()
    with pytest.raises(ValueError, match="does not support setting experts"):
        model.set_experts_implementation("grouped_mm")
    assert stock_settings(model) == STOCK_SETTINGS
    for experts in ("eager", "grouped_mm"):
        twin: Any = stock_twin(model, Setting(experts))
        assert {layer.experts.config._experts_implementation for layer in find_moe_layers(twin)} == {experts}


def test_a_model_of_other_dispatch_is_timed_as_it_was_loaded() -> None:
    model = CASES["deepseek"].make()
    with pytest.raises(ModelError, match="cannot be chosen"):
        stock_twin(model, Setting("eager"))
    settings = stock_settings(model)
    assert [str(setting) for setting in settings] == [
        "as loaded", "as loaded, MoE blocks compiled", "as loaded, decoder layers compiled",
        "as loaded, all layers as one compiled",
    ]  # fmt: skip


def test_regions_are_named_as_optimize_takes_them(vlm: nn.Module) -> None:
    names = [str(setting) for setting in our_settings(vlm)]
    assert names == ["modes-fx", 'modes-fx, region="layer"', 'modes-fx, region="model"']
    assert str(Setting(OURS, "layer", "eager")) == 'modes-fx, region="layer", eager attention'
