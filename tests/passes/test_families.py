"""Static dispatch in real families, without Inductor; ``tests/families`` takes all families through the compact one."""

import pytest
import torch
from torch import nn

import modes_fx
from modes_fx.passes.skip_experts import Dispatch
from tests import harness, oracle, tiny
from tests.harness import logits, plan_of, relative_error
from tests.wide import beyond


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "qwen3_vl_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_static_form_of_a_block_equals_its_compact_form(family: str, dtype: torch.dtype) -> None:
    block = _block(tiny.make(family, dtype))
    hidden = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    outputs = []
    for dispatch in ("compact", "static"):
        runtime = harness.FixedRuntime(torch.arange(12) % 3, torch.tensor([0.3, 0.45, float("inf")]))
        run = harness.compiled_block(block, dispatch, runtime)
        with torch.no_grad():
            out = run(hidden)
        outputs.append((out[0] if isinstance(out, tuple) else out).float())
        (graph,) = runtime.graphs
        assert [(record.status, record.code, record.dispatch) for record in graph] == [("rewritten", "", dispatch)]
        (pairs,) = runtime.recorded
        assert 0 < len(pairs) < 12 * graph[0].top_k
    scale = outputs[0].abs().max()
    # bfloat16: compact adds a token's experts up in float32, static in the stock order of the sum
    assert (outputs[0] - outputs[1]).abs().max() <= (1e-5 if dtype is torch.float32 else 0.02) * scale


def test_static_dispatch_of_a_whole_model_skips_what_the_oracle_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    log = harness.GemmLog()
    harness.compile_with(monkeypatch, log)
    model, inputs = tiny.make(), tiny.mixed_batch(seed=3)
    classes = tiny.classes(inputs)
    bounds = oracle.random_bounds(model, classes, seed=9, **inputs)
    wanted = oracle.Oracle(tiny.make(), bounds)
    expected = wanted(classes, **inputs, use_cache=False).logits
    modes_fx.optimize(model, plan_of(bounds), dispatch="static")
    assert relative_error(logits(model, inputs), expected, classes != 2) <= 2e-5
    assert log.computed == [int(kept) for kept in wanted.kept.sum(dim=(1, 2)) for _ in range(2)]
    assert set(log.rows) == {classes.numel() * 3}


@pytest.mark.parametrize("family", beyond({"gpt_oss"}, ["gpt_oss", "deepseek_v3", "qwen3_vl_moe"], str))
@pytest.mark.parametrize("dispatch", ["compact", "static"])
@pytest.mark.usefixtures("without_inductor")
def test_dispatches_are_found_where_a_default_device_is_set(family: str, dispatch: Dispatch) -> None:
    model, inputs = tiny.make(family), tiny.text_batch()
    stock = logits(model, inputs)
    with torch.device("cpu"):  # dynamo then writes a // b as torch.floor_divide(a, b) and a * b as a.mul(b)
        modes_fx.optimize(model, dispatch=dispatch)
        actual = logits(model, inputs)
    assert not modes_fx.report(model).rejected
    assert (actual - stock).abs().max() <= 1e-5 * stock.abs().max()


def _block(model: nn.Module) -> nn.Module:
    experts = oracle.experts_of(model)[-1]
    return next(module for module in model.modules() if experts in module.children())
