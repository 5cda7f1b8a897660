"""On an NVIDIA GPU, with the static dispatch that ``auto`` picks there; skipped without one."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import modes_fx
from modes_fx.graph.backend import inductor
from tests import harness, oracle, tiny
from tests.harness import logits, plan_of, relative_error
from tests.passes.conftest import FORMS, STOCK, Routing, assert_close, expected, form_id
from tests.passes.experts import check_experts

DEVICE = "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("fresh_dynamo", "whole_float32"),
]

CAPTURABLE = [(stock, dtype) for stock in STOCK for dtype in (torch.float32, torch.bfloat16)]


@pytest.fixture
def whole_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let cuDNN's convolutions, which embed patches, compute in float32 as a CPU does: by default they take TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return on_device(tiny.mixed_batch(seed=11))


def on_device(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(DEVICE) for name, value in inputs.items()}


class Block:
    """Experts on the GPU behind the static dispatch; everything they are given lies in memory of its own."""

    def __init__(self, stock: str, dtype: torch.dtype, compile_graph: Callable[..., Any], tokens: int = 8) -> None:
        self.dtype = dtype
        self.experts = oracle.experts_of(tiny.make("olmoe", dtype))[0].to(DEVICE)
        self.experts.config._experts_implementation = stock
        self.classes = torch.arange(tokens) % 3
        self.runtime = harness.FixedRuntime(self.classes.to(DEVICE), torch.zeros(3, device=DEVICE))
        self.given = self._routed(0)
        self._run = harness.compiled_block(self.experts, "static", self.runtime, compile_graph, dynamic=False)

    def run(self) -> Tensor:
        with torch.no_grad():
            return self._run(*self.given)

    def give(self, seed: int, bounds: list[float]) -> None:
        """Put other inputs and bounds where the old ones were."""
        for old, new in zip(self.given, self._routed(seed), strict=True):
            old.copy_(new)
        self.runtime.bounds.copy_(torch.tensor(bounds))

    def check(self, out: Tensor) -> None:
        routing = Routing(*(tensor.cpu() for tensor in self.given))
        keep = oracle.at_least(routing.weights, self.runtime.bounds.cpu()[self.classes])
        assert_close(out.cpu(), expected(self.experts.cpu(), routing, keep), self.dtype)
        self.experts.to(DEVICE)

    def _routed(self, seed: int) -> list[Tensor]:
        routing = Routing.random(len(self.classes), self.dtype, seed)
        return [routing.hidden.to(DEVICE), routing.ids.to(DEVICE), routing.weights.to(DEVICE)]


ROUNDS = [(1, [0.0, 0.0, math.inf]), (2, [0.25, 0.4, math.inf]), (3, [math.inf] * 3), (4, [0.3, 0.2, math.inf])]


@pytest.mark.parametrize("form", FORMS, ids=form_id)
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "gpt_oss"])
def test_experts_skip_what_their_eager_loop_drops(family: str, form: tuple[str, str, torch.dtype]) -> None:
    check_experts(oracle.experts_of(tiny.make(family))[-1], 32, *form, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stock", STOCK)
def test_generated_code_computes_what_a_loop_over_kept_pairs_does(stock: str, dtype: torch.dtype) -> None:
    block = Block(stock, dtype, inductor)
    for seed, bounds in ROUNDS:
        block.give(seed, bounds)
        block.check(block.run())


@pytest.mark.parametrize(("stock", "dtype"), CAPTURABLE, ids=lambda value: str(value).removeprefix("torch."))
def test_one_captured_graph_serves_other_inputs_and_other_bounds(stock: str, dtype: torch.dtype) -> None:
    block = Block(stock, dtype, harness.uncompiled)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            block.run()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):  # raises where anything waits for the device
        out = block.run()
    for seed, bounds in ROUNDS:
        block.give(seed, bounds)
        captured.replay()
        block.check(out)


@pytest.mark.parametrize(("stock", "dtype"), CAPTURABLE, ids=lambda value: str(value).removeprefix("torch."))
def test_inductor_captures_the_block_as_reduce_overhead_asks_for(stock: str, dtype: torch.dtype) -> None:
    counters.clear()
    block = Block(stock, dtype, functools.partial(inductor, **{"triton.cudagraphs": True}))
    for seed, bounds in [*ROUNDS, *ROUNDS]:
        block.give(seed, bounds)
        torch.compiler.cudagraph_mark_step_begin()
        block.check(block.run().clone())
    assert not counters["inductor"]["cudagraph_skips"]


def test_a_model_skips_what_the_oracle_drops(inputs: dict[str, Tensor]) -> None:
    on_cpu = {name: value.cpu() for name, value in inputs.items()}
    classes = tiny.classes(on_cpu)
    bounds = oracle.random_bounds(tiny.make(), classes, seed=3, **on_cpu)
    wanted = oracle.Oracle(tiny.make(), bounds)
    expected_logits = wanted(classes, **on_cpu, use_cache=False).logits
    model = modes_fx.optimize(tiny.make().to(DEVICE), plan_of(bounds))
    with modes_fx.stats(model) as stats:
        actual = logits(model, inputs).cpu()
    assert relative_error(actual, expected_logits, classes != 2) <= 1e-4
    assert stats.pairs_routed.equal(wanted.routed)
    assert stats.pairs_kept.equal(wanted.kept)
    assert {(site.form, site.dispatch) for site in modes_fx.report(model).rewritten} == {("grouped_mm", "static")}


def test_generate_skips_in_prefill_and_decoding_with_a_graph_each(
    inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.compile_with(monkeypatch, inductor)
    model: nn.Module = tiny.make().to(DEVICE)
    settings = {"max_new_tokens": 6, "do_sample": False}
    stock = model.generate(**inputs, **settings)  # stock decodes with batched_mm here
    modes_fx.optimize(model)
    assert model.generate(**inputs, **settings).equal(stock)
    assert {site.form for site in modes_fx.report(model).sites} == {"grouped_mm"}
    modes_fx.set_plan(model, modes_fx.SkipPlan.uniform(text=0.25, vision=0.4))
    with modes_fx.stats(model) as stats:
        model.generate(**inputs, **settings)
    assert 0 < stats.skip_ratio(phase="prefill") < 1
    assert 0 < stats.skip_ratio(phase="decode") < 1
    assert modes_fx.report(model).graphs == 2


def test_generate_compiles_a_static_cache_into_cuda_graphs_that_serve_every_plan(inputs: dict[str, Tensor]) -> None:
    model: nn.Module = tiny.make(dtype=torch.bfloat16).to(DEVICE)
    inputs = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    modes_fx.optimize(model)
    settings = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    counters.clear()
    for plan in (None, modes_fx.SkipPlan.uniform(text=0.25, vision=0.4), modes_fx.SkipPlan.uniform(text=math.inf, vision=0.0)):
        modes_fx.set_plan(model, plan)
        eagerly = model.generate(**inputs, disable_compile=True, **settings)
        assert model.generate(**inputs, **settings).equal(eagerly)
    assert not counters["inductor"]["cudagraph_skips"]
