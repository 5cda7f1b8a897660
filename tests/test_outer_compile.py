"""A torch.compile around an optimised model: dynamo inlines blocks and passes their compiled calls by, yet all is skipped."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import Unsupported
from transformers import CompileConfig

import modes_fx
from modes_fx.errors import ModelError
from modes_fx.plan import SkipPlan
from tests import tiny
from tests.convert.cases import CASES
from tests.harness import logits, relative_error
from tests.oracle import Oracle

pytestmark = [
    pytest.mark.usefixtures("without_inductor"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo"),  # the stock model's own graph breaks
]

PLAN = SkipPlan.uniform(text=0.25, vision=0.4)

Wrap = Callable[[nn.Module], tuple[Any, nn.Module]]


def compiled_after(model: nn.Module) -> tuple[Any, nn.Module]:
    modes_fx.optimize(model, PLAN)
    return torch.compile(model, backend="eager"), model


def compiled_in_place_after(model: nn.Module) -> tuple[Any, nn.Module]:
    modes_fx.optimize(model, PLAN)
    model.compile(backend="eager")
    return model, model


def compiled_before(model: nn.Module) -> tuple[Any, nn.Module]:
    outer = torch.compile(model, backend="eager")
    modes_fx.optimize(outer, PLAN)
    return outer, outer


def compiled_in_place_before(model: nn.Module) -> tuple[Any, nn.Module]:
    model.compile(backend="eager")
    modes_fx.optimize(model, PLAN)
    return model, model


@pytest.fixture
def text_model(fresh_dynamo: None) -> nn.Module:
    return tiny.make("qwen3_moe")


@pytest.mark.parametrize("wrap", [compiled_after, compiled_in_place_after, compiled_before, compiled_in_place_before])
def test_what_is_compiled_around_the_model_skips_the_pairs_that_the_oracle_drops(wrap: Wrap, text_model: nn.Module) -> None:
    ids = tiny.text_batch()["input_ids"]
    oracle = Oracle(text_model, PLAN.bounds(2))
    expected = oracle(torch.zeros_like(ids), input_ids=ids, use_cache=False).logits
    model, optimized = wrap(text_model)
    with modes_fx.stats(optimized) as stats:
        actual = logits(model, tiny.text_batch())
    assert 0 < stats.skip_ratio() < 1
    assert stats.pairs_kept.equal(oracle.kept)
    assert relative_error(actual, expected, ids >= 0) <= 1e-5


@pytest.mark.slow
def test_a_compiled_language_model_skips_by_modality(vlm: nn.Module) -> None:
    inputs = tiny.mixed_batch(seed=5)
    with modes_fx.stats(modes_fx.optimize(vlm, PLAN)) as alone:
        expected = logits(vlm, inputs)
    torch._dynamo.reset()
    vlm.model.language_model.compile(backend="eager")
    with modes_fx.stats(vlm).reset() as stats:
        actual = logits(vlm, inputs)
    assert stats.pairs_kept.equal(alone.pairs_kept)
    assert (actual - expected).abs().max() <= 1e-5


def test_one_graph_around_the_model_is_refused(text_model: nn.Module) -> None:
    modes_fx.optimize(text_model, PLAN)
    with pytest.raises(Unsupported, match="modes_fx"):
        logits(torch.compile(text_model, backend="eager", fullgraph=True), tiny.text_batch())


@pytest.mark.slow
def test_restored_model_compiles_whole(text_model: nn.Module) -> None:
    stock = logits(text_model, tiny.text_batch())
    modes_fx.restore(modes_fx.optimize(text_model, PLAN))
    actual = logits(torch.compile(text_model, backend="eager"), tiny.text_batch())
    assert (actual - stock).abs().max() <= 1e-5


def test_generate_with_its_own_compilation_skips(text_model: nn.Module) -> None:
    """With a static cache, generate compiles the whole model's call for decoding."""
    ids = tiny.text_batch()["input_ids"]
    modes_fx.optimize(text_model, PLAN)
    settings = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    with modes_fx.stats(text_model) as plain:
        expected = text_model.generate(ids, **settings)
    torch._dynamo.reset()
    config = CompileConfig(backend="eager", fullgraph=False, mode=None)
    config._compile_all_devices = True
    with modes_fx.stats(text_model).reset() as stats:
        actual = text_model.generate(ids, compile_config=config, **settings)
    assert actual.equal(expected)
    assert stats.pairs_kept.equal(plain.pairs_kept)
    assert hasattr(text_model, "_compiled_call")  # generate did compile


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("case", ["deepseek", "llama4"])
def test_converted_blocks_skip_or_are_refused(case: str) -> None:
    """Some blocks break the outer graph, and then their stand-ins run; others are inlined, and nothing would be skipped."""
    model = CASES[case].make()
    del model.model.layers[2:]  # dynamo traces the loop of each block anew, for seconds
    modes_fx.optimize(model, PLAN)
    inputs = tiny.text_batch()
    expected = logits(model, inputs)
    outer = torch.compile(model, backend="eager")
    if case == "llama4":
        with pytest.raises(ModelError, match="passes its converted blocks by"):
            logits(outer, inputs)
    else:
        assert (logits(outer, inputs) - expected).abs().max() <= 1e-5
