"""Each converted form in a real decoder: found, unchanged at 0, the oracle's logits above it, stock again after restore."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modes_fx
from modes_fx.plan import SkipPlan
from tests import harness, tiny
from tests.harness import logits, plan_of, relative_error
from tests.models.convert.cases import CASES, Case, Oracle, random_bounds
from tests.wide import beyond


@pytest.fixture(params=beyond({"deepseek", "qwen3_vl", "llama4", "dbrx"}, CASES, str))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that optimize could change."""
    modules = list(model.modules())
    return {
        "names": list(model.state_dict()),
        "parameters": [id(parameter) for parameter in model.parameters()],
        "calls": [module._compiled_call_impl for module in modules],
        "attributes": [sorted(set(vars(module)) - {"_compiled_call_impl"}) for module in modules],
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules],
        "storages": len({parameter.untyped_storage().data_ptr() for parameter in model.parameters()}),
    }


@pytest.mark.usefixtures("without_inductor")
def test_it_is_converted_and_unchanged_at_0_and_stock_again_after_restore(case: Case) -> None:
    model, inputs = case.make(), case.inputs()
    real = tiny.classes(inputs) != 2
    before, stock = state_of(model), logits(model, inputs)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    modes_fx.optimize(model)
    report = modes_fx.report(model)
    assert report.found == len(case.blocks(model)) >= 2
    assert {site.status for site in report.sites} == {"converted"}, str(report)
    assert report.converted == report.rewritten == report.sites
    assert all(site.name.endswith(case.experts) for site in report.sites)
    assert relative_error(logits(model, inputs), stock, real) <= 1e-5
    assert modes_fx.report(model).graphs <= 2
    while_optimised = state_of(model)
    assert all(while_optimised[key] == before[key] for key in ("names", "parameters", "hooks"))
    assert all(value.equal(values[name]) for name, value in model.state_dict().items())
    modes_fx.restore(model)
    assert state_of(model) == before
    assert all(value.equal(values[name]) for name, value in model.state_dict().items())
    assert logits(model, inputs).equal(stock)


@pytest.mark.parametrize(
    ("name", "dispatch"),
    [*((name, "compact") for name in CASES), *((name, "static") for name in ("deepseek", "dbrx", "longcat_flash", "llama4"))],
)
def test_random_thresholds_give_the_oracles_logits_and_rows(name: str, dispatch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log = harness.GemmLog()
    harness.compile_with(monkeypatch, log)
    case = CASES[name]
    inputs = case.inputs(seed=2)
    bounds = random_bounds(case, inputs, seed=5)
    oracle = Oracle(case, bounds)
    wanted = oracle(inputs)
    model, real = case.make(), tiny.classes(inputs) != 2
    stock = logits(model, inputs)
    modes_fx.optimize(model, plan_of(bounds), dispatch=dispatch)
    with modes_fx.stats(model) as stats:
        actual = logits(model, inputs)
    assert relative_error(actual, wanted, real) <= 5e-5
    assert relative_error(actual, stock, real) > 1e-3  # it did skip something that matters
    assert log.computed == [kept for kept in oracle.kept for _ in range(case.gemms)]
    assert stats.pairs_kept.sum(dim=(1, 2)).tolist() == oracle.kept
    if dispatch == "compact":
        assert log.rows == log.computed
    modes_fx.set_plan(model, SkipPlan.uniform(text=float("inf"), vision=float("inf")))
    log.computed.clear()
    nothing = Oracle(case, torch.full_like(bounds, float("inf")))(inputs)
    assert relative_error(logits(model, inputs), nothing, real) <= 5e-5
    assert set(log.computed) == {0}


@pytest.mark.slow
@pytest.mark.usefixtures("without_inductor")
def test_a_bfloat16_block_computes_what_the_stock_one_does(case: Case) -> None:
    model = case.make(torch.bfloat16)
    hidden = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        stock = [first(block(hidden)) for block in case.blocks(model)]
        modes_fx.optimize(model)
        for block, wanted in zip(case.blocks(model), stock, strict=True):
            actual = first(block(hidden))
            assert actual.dtype is torch.bfloat16
            assert (actual.float() - wanted.float()).abs().max() <= 0.02 * wanted.float().abs().max()


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("name", ["deepseek", "qwen3_vl", "dbrx"])
def test_generation_goes_through_the_stand_ins(name: str) -> None:
    case = CASES[name]
    model, inputs = case.make(), case.inputs()
    stock = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    modes_fx.optimize(model)
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).equal(stock)
    modes_fx.set_plan(model, SkipPlan.uniform(text=0.3, vision=0.3))
    with modes_fx.stats(model) as stats:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert 0 < stats.skip_ratio(phase="decode") < 1
    assert modes_fx.report(model).graphs <= 2


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
