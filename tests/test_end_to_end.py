"""The real thing: Inductor's code for prefill and decoding, against the stock model and the oracle."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch._inductor import compile_fx

import modes_fx
from modes_fx.plan import SkipPlan
from tests import harness, oracle, tiny
from tests.harness import logits, plan_of, relative_error


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return tiny.mixed_batch(seed=11)


@pytest.fixture(scope="module")
def compilations() -> Iterator[list[fx.GraphModule]]:
    """Every graph that Inductor compiled."""
    modules: list[fx.GraphModule] = []
    inductor = compile_fx.compile_fx

    def note(module: fx.GraphModule, *args: Any, **options: Any) -> Any:
        modules.append(module)
        return inductor(module, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_fx, "compile_fx", note)
        yield modules


@pytest.fixture(scope="module", params=["compact", "static"])
def compiled(request: pytest.FixtureRequest, compilations: list[fx.GraphModule]) -> Iterator[nn.Module]:
    model = modes_fx.optimize(tiny.make(), dispatch=request.param)
    yield model
    modes_fx.restore(model)


@pytest.fixture(scope="module")
def compiled_bfloat16() -> Iterator[nn.Module]:
    model = modes_fx.optimize(tiny.make(dtype=torch.bfloat16))
    yield model
    modes_fx.restore(model)


def test_logits_at_zero_are_those_of_the_stock_model(compiled: nn.Module, inputs: dict[str, Tensor]) -> None:
    stock = logits(tiny.make(), inputs)
    modes_fx.set_plan(compiled, None)
    assert relative_error(logits(compiled, inputs), stock, tiny.classes(inputs) != 2) <= 1e-5


def test_logits_and_counts_at_random_thresholds_are_the_oracles(compiled: nn.Module, inputs: dict[str, Tensor]) -> None:
    classes = tiny.classes(inputs)
    for seed in range(3):
        bounds = oracle.random_bounds(tiny.make(), classes, seed=seed, **inputs)
        wanted = oracle.Oracle(tiny.make(), bounds)
        expected = wanted(classes, **inputs, use_cache=False).logits
        modes_fx.set_plan(compiled, plan_of(bounds))
        with modes_fx.stats(compiled).reset() as stats:
            assert relative_error(logits(compiled, inputs), expected, classes != 2) <= 2e-5
        assert stats.pairs_kept.equal(wanted.kept)


def test_a_poisoned_expert_that_is_skipped_leaves_finite_logits(compiled: nn.Module, inputs: dict[str, Tensor]) -> None:
    classes = tiny.classes(inputs)
    experts = oracle.experts_of(compiled)
    stock = tiny.make()
    everything = SkipPlan.uniform(text=float("inf"), vision=float("inf"))
    modes_fx.set_plan(compiled, everything)
    clean = logits(compiled, inputs)
    with torch.no_grad():
        for poisoned in (*experts, *oracle.experts_of(stock)):
            for parameter in poisoned.parameters():
                parameter.fill_(float("nan"))
        out = logits(compiled, inputs)
        compiled.load_state_dict(tiny.make().state_dict())
    assert not torch.isfinite(logits(stock, inputs)[classes != 2]).any()
    assert out[classes != 2].equal(clean[classes != 2])


def test_30_generated_tokens_are_the_stock_models_and_take_two_graphs(compiled: nn.Module, inputs: dict[str, Tensor]) -> None:
    modes_fx.set_plan(compiled, None)
    wanted = tiny.make().generate(**inputs, max_new_tokens=30, do_sample=False)
    assert compiled.generate(**inputs, max_new_tokens=30, do_sample=False).equal(wanted)
    before = counters["stats"]["unique_graphs"]
    modes_fx.set_plan(compiled, SkipPlan.uniform(text=0.3, vision=0.4))
    with modes_fx.stats(compiled).reset() as stats:
        compiled.generate(**inputs, max_new_tokens=30, do_sample=False)
    modes_fx.set_plan(compiled, SkipPlan.uniform(text=float("inf"), vision=0.1))
    compiled.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert counters["stats"]["unique_graphs"] == before
    assert modes_fx.report(compiled).graphs <= 2
    assert int(stats.pairs_routed[:, 0, 1].sum()) == 2 * 29 * 3 * 3  # layers, steps, sequences, experts a token
    assert 0 < stats.skip_ratio(phase="decode") < 1


def test_bfloat16_at_zero_is_no_further_from_float64_than_stock_is(
    compiled_bfloat16: nn.Module, inputs: dict[str, Tensor]
) -> None:
    stock = tiny.make(dtype=torch.bfloat16)
    real = tiny.classes(inputs) != 2
    modes_fx.set_plan(compiled_bfloat16, None)
    ours_error, stock_error = 0.0, 0.0
    for seed in range(4):
        batch = tiny.mixed_batch(seed=seed)
        real = tiny.classes(batch) != 2
        reference = oracle.Oracle(stock, None)(tiny.classes(batch), **batch, use_cache=False).logits[real]
        ours_error += float((logits(compiled_bfloat16, batch)[real].double() - reference).abs().mean())
        stock_error += float((logits(stock, batch)[real].double() - reference).abs().mean())
    # Both round at every layer, not at the same elements: their mean errors are two draws of one distribution. Over four
    # batches of some 2,700 logits each these lie within a few percent of each other.
    assert ours_error <= 1.05 * stock_error


def test_bfloat16_counts_are_the_dispatched_ones_and_decoding_works(
    compiled_bfloat16: nn.Module, inputs: dict[str, Tensor]
) -> None:
    modes_fx.set_plan(compiled_bfloat16, SkipPlan.uniform(text=float("inf"), vision=0.0))
    with modes_fx.stats(compiled_bfloat16).reset() as stats:
        out = compiled_bfloat16.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert out.shape == (3, 22)
    assert stats.skip_ratio(modality="text") == 1.0
    assert stats.skip_ratio(modality="vision") == 0.0
    assert torch.isfinite(logits(compiled_bfloat16, inputs)).all()


def test_inductor_is_what_runs(compiled: nn.Module, inputs: dict[str, Tensor], compilations: list[fx.GraphModule]) -> None:
    logits(compiled, inputs)
    dispatch = modes_fx.report(compiled).sites[0].dispatch
    gathers = {torch.ops.modes_fx.sort_pairs.default, "nonzero"}
    by_inductor = [m for m in compilations if bool(gathers & set(harness.targets(m))) == (dispatch == "compact")]
    assert len(by_inductor) >= modes_fx.report(compiled).graphs >= 1
