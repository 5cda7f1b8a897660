"""Training an optimised model: autocast, gradients, data parallelism, low-rank adapters."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import modes_fx
from modes_fx.errors import ModelError
from modes_fx.plan import SkipPlan
from tests import oracle, tiny
from tests.harness import judged, logits, relative_error

pytestmark = [
    pytest.mark.usefixtures("without_inductor"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # dynamo hides it, if it may
]

PLAN = SkipPlan.uniform(text=0.25, vision=0.4)
INPUTS = tiny.mixed_batch(seed=5)
REAL = tiny.classes(INPUTS) != 2


def test_autocast_skips_what_the_oracle_skips_in_it(vlm: nn.Module) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        judge = judged(vlm, INPUTS, PLAN)
        expected = logits(judge.model, INPUTS)
        with modes_fx.stats(modes_fx.optimize(vlm, PLAN)) as stats:
            actual = logits(vlm, INPUTS)
    assert actual.dtype == expected.dtype
    assert relative_error(actual, expected, REAL) <= 0.03
    assert 0 < stats.skip_ratio() < 1
    assert (stats.pairs_kept - judge.kept / 2).abs().max() <= 1


@pytest.mark.parametrize("region", ["moe", "model"])
def test_gradients_are_those_of_the_stock_model_with_dropped_weights_at_0(vlm: nn.Module, region: Any) -> None:
    judge = judged(vlm, INPUTS, PLAN)
    modes_fx.optimize(vlm.train(), PLAN, region=region)
    losses = []
    for model in (judge.model.train(), vlm):
        loss = model(**INPUTS, labels=INPUTS["input_ids"], use_cache=False).loss
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    compare_gradients(vlm, judge.model)


def compare_gradients(actual: nn.Module, expected: nn.Module) -> None:
    theirs = dict(expected.named_parameters())
    for name, parameter in actual.named_parameters():
        wanted = theirs[name].grad
        assert (parameter.grad is None) == (wanted is None), name
        if wanted is not None:
            assert (parameter.grad - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 1e-6, name


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def optimized_then_wrapped(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(modes_fx.optimize(model, PLAN), find_unused_parameters=True)


def wrapped_then_its_model_optimized(model: nn.Module) -> nn.Module:
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    modes_fx.optimize(wrapped.module, PLAN)
    return wrapped


def wrapped_then_optimized(model: nn.Module) -> nn.Module:
    return modes_fx.optimize(DistributedDataParallel(model, find_unused_parameters=True), PLAN)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("order", [optimized_then_wrapped, wrapped_then_its_model_optimized, wrapped_then_optimized])
def test_data_parallel_training(order: Callable[[nn.Module], nn.Module]) -> None:
    model, inputs = tiny.make("qwen3_moe").train(), tiny.text_batch()
    judge = judged(model, inputs, PLAN)
    wrapped = order(model)
    for each in (judge.model.train(), wrapped):
        each(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    compare_gradients(model, judge.model)
    assert relative_error(logits(wrapped, inputs), logits(judge.model, inputs), inputs["input_ids"] >= 0) <= 1e-5


EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}
ATTENTION = {"target_modules": ["q_proj"]}
BOTH = {**EXPERTS, **ATTENTION}


def adapted(model: nn.Module, where: dict[str, Any]) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    with warnings.catch_warnings():  # its own, of names that transformers deprecates
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **where)
        wrapped: nn.Module = peft.get_peft_model(model, config)
    return wrapped


def adapted_oracle(where: dict[str, Any]) -> nn.Module:
    """A stock model with adapters, whose experts never get a weight below the text's threshold."""
    wrapped = adapted(tiny.make("qwen3_moe"), where)
    wrapped.get_base_model().set_experts_implementation("eager")

    def silence(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, ids, weights = (*args, *kwargs.values())
        return (hidden, ids, weights.where(weights >= 0.25, torch.zeros_like(weights))), {}

    for experts in oracle.experts_of(wrapped):
        experts.register_forward_pre_hook(silence, with_kwargs=True)
    return wrapped


def compare_adapted(actual: nn.Module, expected: nn.Module) -> None:
    inputs = tiny.text_batch()
    assert relative_error(logits(actual, inputs), logits(expected, inputs), inputs["input_ids"] >= 0) <= 1e-5
    for each in (actual, expected):
        each.train()(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    compare_gradients(actual, expected)
    assert [name for name, parameter in actual.named_parameters() if parameter.grad is not None and "lora" in name]


@pytest.mark.parametrize("where", [ATTENTION, EXPERTS, BOTH], ids=["attention", "experts", "both"])
def test_adapters_that_were_there_before(where: dict[str, Any]) -> None:
    model = adapted(tiny.make("qwen3_moe"), where)
    modes_fx.optimize(model.get_base_model(), PLAN)
    compare_adapted(model, adapted_oracle(where))


@pytest.mark.parametrize("region", ["moe", "model"])
def test_adapters_of_attention_that_come_later(region: Any) -> None:
    model = adapted(modes_fx.optimize(tiny.make("qwen3_moe"), PLAN, region=region), ATTENTION)
    compare_adapted(model, adapted_oracle(ATTENTION))


def test_adapters_of_experts_that_come_later_are_refused_until_optimised_again() -> None:
    model = adapted(modes_fx.optimize(tiny.make("qwen3_moe"), PLAN), EXPERTS)
    with pytest.raises(ModelError, match="cannot be traced as one graph"):
        logits(model, tiny.text_batch())
    modes_fx.optimize(model.get_base_model(), PLAN)
    compare_adapted(model, adapted_oracle(EXPERTS))
