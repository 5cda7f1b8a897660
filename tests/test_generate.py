"""``generate`` in all its ways, over every kind of cache, with an optimised model."""

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import modes_fx
from modes_fx.plan import SkipPlan
from tests import tiny
from tests.harness import judged, logits

pytestmark = pytest.mark.usefixtures("without_inductor")

PLAN = SkipPlan.uniform(text=0.25, vision=0.4)
ALL = SkipPlan.uniform(text=float("inf"), vision=float("inf"))

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
}


def generated(model: nn.Module, inputs: dict[str, Tensor], **settings: Any) -> Any:
    torch.manual_seed(3)
    settings = {"max_new_tokens": 8, "do_sample": False, **settings}
    if "pixel_values" in inputs:
        settings["suppress_tokens"] = [tiny.IMAGE]  # no image without pixels
    return model.generate(**inputs, **settings)


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


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_of_the_users_own(optimized_vlm: nn.Module, kind: str) -> None:
    inputs = tiny.mixed_batch(seed=5)

    def cache(model: nn.Module) -> Any:
        text = model.config.get_text_config()
        return StaticCache(config=text, max_cache_len=64) if kind == "static" else DynamicCache(config=text)

    stock = tiny.make()
    wanted = generated(stock, inputs, past_key_values=cache(stock))
    assert generated(optimized_vlm, inputs, past_key_values=cache(optimized_vlm)).equal(wanted)


UNCHANGED: dict[str, dict[str, Any]] = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 3},
    "chunked prefill of one": {"prefill_chunk_size": 1},
    "scores": {"output_scores": True, "return_dict_in_generate": True},
}


@pytest.mark.parametrize("plan", [None, PLAN], ids=["all kept", "plan"])
@pytest.mark.parametrize("way", UNCHANGED)
def test_ways_to_generate_that_change_no_token(optimized_text: nn.Module, way: str, plan: SkipPlan | None) -> None:
    inputs = {"input_ids": torch.tensor([[5, 9, 7, 5, 9, 7, 5, 9]])}
    model = modes_fx.set_plan(optimized_text, plan)
    plain = generated(model, inputs)
    with modes_fx.stats(model).reset() as stats:
        actual = generated(model, inputs, **UNCHANGED[way])
    assert getattr(actual, "sequences", actual).equal(plain)
    assert (stats.skip_ratio() > 0) == (plan is not None)
    if plan is None:
        assert plain.equal(generated(tiny.make("qwen3_moe"), inputs))


SETTINGS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "beams sampled": {"num_beams": 2, "do_sample": True, "top_k": 20},
    "several": {"num_return_sequences": 3, "do_sample": True, "top_p": 0.9},
    "guided": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("way", SETTINGS)
def test_ways_to_generate_as_the_oracle(optimized_text: nn.Module, way: str) -> None:
    model, inputs = modes_fx.set_plan(optimized_text, PLAN), tiny.text_batch(1)
    judge = judged(tiny.make("qwen3_moe"), inputs, PLAN)
    judge._told = lambda name, tokens: (torch.zeros(tokens, dtype=torch.int64), 0)
    assert generated(model, inputs, **SETTINGS[way]).equal(generated(judge.model, inputs, **SETTINGS[way]))


@pytest.mark.parametrize("who", ["both", "model", "assistant"])
def test_assisted_decoding(optimized_text: nn.Module, who: str) -> None:
    inputs = tiny.text_batch(1, 6)
    model, assistant = modes_fx.set_plan(optimized_text, PLAN), tiny.make("qwen3_moe")
    if who == "assistant":
        model = tiny.make("qwen3_moe")
    plain = generated(model, inputs)
    if who != "model":
        modes_fx.optimize(assistant, ALL)
    assert generated(model, inputs, assistant_model=assistant).equal(plain)


@pytest.mark.parametrize("plan", [None, PLAN], ids=["all kept", "plan"])
def test_continuous_batching(optimized_text: nn.Module, plan: SkipPlan | None) -> None:
    prompts = [[5, 9, 7, 5, 9], [3, 4, 5], [20, 21, 22, 23, 24, 25, 26]]
    model = modes_fx.set_plan(optimized_text, plan)
    plain = [generated(model, {"input_ids": torch.tensor([prompt])})[0, len(prompt) :].tolist() for prompt in prompts]
    config = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=tiny.PAD)
    pages = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)
    with modes_fx.stats(model).reset() as stats:
        answers = model.generate_batch(prompts, generation_config=config, continuous_batching_config=pages, warmup=False)
    in_order = [answers[name] for name in sorted(answers)]
    assert [(answer.error, answer.generated_tokens) for answer in in_order] == [(None, tokens) for tokens in plain]
    assert int(stats.pairs_routed[0].sum()) == 3 * (sum(map(len, prompts)) + 7 * len(prompts))
    assert (stats.skip_ratio() > 0) == (plan is not None)


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_offloaded_layers_generate_and_come_back(optimized_text: nn.Module, how: str, tmp_path: Path) -> None:
    expected = generated(modes_fx.set_plan(optimized_text, PLAN), tiny.text_batch())
    model = tiny.make("qwen3_moe")
    stock = logits(model, tiny.text_batch())
    if how == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    modes_fx.optimize(model, PLAN)
    assert generated(model, tiny.text_batch()).equal(expected)
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())
    modes_fx.restore(model)
    assert (logits(model, tiny.text_batch()) - stock).abs().max() <= 1e-5
    accelerate.hooks.remove_hook_from_submodules(model)
