"""``generate`` in all its ways, over every kind of cache, with an optimised model."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import modes_fx
from modes_fx.plan import SkipPlan
from tests import tiny

pytestmark = pytest.mark.usefixtures("without_inductor")

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3, "do_sample": False},
    "static cache": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    "no cache": {"do_sample": False, "use_cache": False},
}


def generated(model: nn.Module, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
    torch.manual_seed(3)
    return model.generate(**inputs, max_new_tokens=6, suppress_tokens=[tiny.IMAGE], **settings)  # no image without pixels


@pytest.mark.parametrize("way", WAYS)
def test_all_kept_generates_what_stock_does_and_thresholds_skip(optimized_vlm: nn.Module, way: str) -> None:
    inputs, settings = tiny.mixed_batch(seed=5), WAYS[way]
    wanted = generated(tiny.make(), inputs, **settings)
    assert generated(optimized_vlm, inputs, **settings).equal(wanted)
    modes_fx.set_plan(optimized_vlm, SkipPlan.uniform(text=float("inf"), vision=0.0))
    with modes_fx.stats(optimized_vlm) as stats:
        generated(optimized_vlm, inputs, **settings)
    assert stats.skip_ratio(modality="text") == 1
    assert stats.skip_ratio(modality="vision") == 0
    decoded = int(stats.pairs_routed[:, 0, 1].sum())
    assert (decoded > 0) == settings.get("use_cache", True)


def test_assisted_generation_by_two_optimised_models() -> None:
    inputs = tiny.text_batch(1, 6)
    model, assistant = tiny.make("qwen3_moe"), tiny.make("qwen3_moe")
    wanted = generated(tiny.make("qwen3_moe"), inputs, do_sample=False)
    modes_fx.optimize(model)
    modes_fx.optimize(assistant, SkipPlan.uniform(text=0.3, vision=0.3))
    with modes_fx.stats(model) as kept, modes_fx.stats(assistant) as skipped:
        assert generated(model, inputs, do_sample=False, assistant_model=assistant).equal(wanted)
    assert kept.skip_ratio() == 0
    assert skipped.skip_ratio() > 0


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_of_the_users_own(optimized_vlm: nn.Module, kind: str) -> None:
    inputs = tiny.mixed_batch(seed=5)

    def cache(model: nn.Module) -> Any:
        text = model.config.get_text_config()
        return StaticCache(config=text, max_cache_len=64) if kind == "static" else DynamicCache(config=text)

    stock = tiny.make()
    wanted = generated(stock, inputs, do_sample=False, past_key_values=cache(stock))
    assert generated(optimized_vlm, inputs, do_sample=False, past_key_values=cache(optimized_vlm)).equal(wanted)
