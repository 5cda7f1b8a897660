"""Whatever compiles or exports an optimised model: one graph where stock has one, the same answers, kept pairs alone."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from transformers import CompileConfig

import modes_fx
from modes_fx.graph import hook
from modes_fx.passes.site import SiteRecord
from modes_fx.plan import SkipPlan
from tests import harness, oracle, tiny
from tests.harness import logits, relative_error
from tests.models.convert.cases import CASES
from tests.wide import beyond

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo"),  # the stock model's own graph breaks
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),  # torch.export's own
]

PLAN = SkipPlan.uniform(text=0.25, vision=0.4)
OTHER = SkipPlan.uniform(text=0.1, vision=0.9)
WITHOUT_INDUCTOR = pytest.mark.usefixtures("without_inductor")
FAMILIES = {"qwen3_moe": tiny.text_batch, "qwen3_vl_moe": lambda: tiny.mixed_batch(seed=5)}
GENERATES_CODE = {"qwen3_vl_moe"}  # for the text model, Inductor's code of such a graph runs in the next test


@pytest.fixture(params=beyond({"qwen3_vl_moe"}, FAMILIES, str))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def hooked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[fx.Graph, tuple[SiteRecord, ...]]]]:
    """The graphs that Inductor's hook was given, as it left them, with their sites; nothing comes from Inductor's caches."""
    seen: list[tuple[fx.Graph, tuple[SiteRecord, ...]]] = []

    def note(graph: fx.Graph) -> tuple[SiteRecord, ...]:
        seen.append((graph, rewrite(graph)))
        return seen[-1][1]

    rewrite = hook.skip_experts
    monkeypatch.setattr(hook, "skip_experts", note)
    with torch._inductor.config.patch(force_disable_caches=True):
        yield seen


def by_itself(**settings: Any) -> CompileConfig:
    """What lets ``generate`` compile a static cache's decoding on a CPU too."""
    config = CompileConfig(**{"fullgraph": True, "mode": None, **settings})
    config._compile_all_devices = True
    return config


def generated(model: nn.Module, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=[tiny.IMAGE], **settings)


@WITHOUT_INDUCTOR
def test_generate_compiles_a_static_cache_into_one_graph_that_computes_kept_pairs_alone(
    family: str, hooked: list[tuple[fx.Graph, tuple[SiteRecord, ...]]]
) -> None:
    model, inputs = tiny.make(family), FAMILIES[family]()
    modes_fx.optimize(model, PLAN)
    expected = generated(model, inputs)
    torch._dynamo.reset()
    counters.clear()
    backend = {} if family in GENERATES_CODE else {"backend": harness.ungenerated}
    settings = {"cache_implementation": "static", "compile_config": by_itself(**backend)}
    actual = generated(model, inputs, **settings)
    assert actual.equal(expected)
    assert not counters["graph_break"]
    ((graph, sites),) = hooked
    assert [(site.status, site.gemms, site.layer) for site in sites] == [
        ("rewritten", "kernels", 0), ("rewritten", "kernels", 1),
    ]  # fmt: skip
    targets = harness.targets(fx.GraphModule({}, graph))
    assert targets.count(torch.ops.modes_fx.sort_pairs.default) == 2
    assert not {torch.histc, torch.ops.transformers.grouped_mm_fallback} & set(targets)
    graphs = counters["stats"]["unique_graphs"]
    for plan in (OTHER, None, PLAN):
        modes_fx.set_plan(model, plan)
        assert generated(model, inputs, **settings).shape == actual.shape
    assert counters["stats"]["unique_graphs"] == graphs
    assert len(hooked) == 1


@pytest.mark.wide
@WITHOUT_INDUCTOR
def test_skipped_experts_leave_no_trace_in_a_static_caches_graph() -> None:
    model, inputs = tiny.make("qwen3_moe"), tiny.text_batch()
    modes_fx.optimize(model, PLAN)
    expected = generated(model, inputs)
    torch._dynamo.reset()
    settings = {"cache_implementation": "static", "compile_config": by_itself()}
    assert generated(model, inputs, **settings).equal(expected)
    modes_fx.set_plan(model, SkipPlan.uniform(text=math.inf, vision=math.inf))
    clean = generated(model, inputs, **settings)
    with torch.no_grad():
        for experts in oracle.experts_of(model):
            for parameter in experts.parameters():
                parameter.fill_(math.nan)
    assert generated(model, inputs, **settings).equal(clean)
    out = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert out(**inputs, use_cache=False).logits.isfinite().all()


@pytest.mark.parametrize(
    "how",
    [
        {"fullgraph": True},
        pytest.param({"backend": "eager", "fullgraph": True}, marks=pytest.mark.wide),
        pytest.param({"dynamic": True, "fullgraph": True}, marks=pytest.mark.wide),
        pytest.param({"mode": "max-autotune-no-cudagraphs"}, marks=pytest.mark.wide),
        pytest.param({"backend": "aot_eager", "fullgraph": True}, marks=pytest.mark.wide),
        pytest.param({"backend": "modes_fx", "fullgraph": True}, marks=pytest.mark.wide),
    ],
    ids=str,
)
@WITHOUT_INDUCTOR
def test_any_compile_around_the_model_answers_as_it_does_eagerly_and_no_plan_compiles_anew(how: dict[str, Any]) -> None:
    inputs = tiny.text_batch()
    models = [modes_fx.optimize(tiny.one_layer(), plan) for plan in (PLAN, OTHER)]
    plans = [SkipPlan.uniform(text=tau, vision=tau) for tau in (0.0, 0.2, 0.35, math.inf)]
    eager = []
    for model in models:
        for plan in plans:
            modes_fx.set_plan(model, plan)
            eager.append(logits(model, inputs))
    outer = [torch.compile(model, **how) for model in models]
    for model in outer:
        logits(model, inputs)
    graphs = counters["stats"]["unique_graphs"]
    for model in outer:
        for plan in plans:
            modes_fx.set_plan(model, plan)
            wanted = eager.pop(0)
            assert relative_error(logits(model, inputs), wanted, torch.ones(wanted.shape[:2]) == 1) <= 1e-5
    assert counters["stats"]["unique_graphs"] == graphs


def compiled_after(model: nn.Module) -> Any:
    modes_fx.optimize(model, PLAN)
    return torch.compile(model, backend="eager")


def compiled_in_place_after(model: nn.Module) -> Any:
    modes_fx.optimize(model, PLAN)
    model.compile(backend="eager")
    return model


def forward_compiled_after(model: nn.Module) -> Any:
    modes_fx.optimize(model, PLAN)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    return model


def forward_compiled_before(model: nn.Module) -> Any:
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    return modes_fx.optimize(model, PLAN)


def compiled_before(model: nn.Module) -> Any:
    return modes_fx.optimize(torch.compile(model, backend="eager"), PLAN)


def compiled_and_called_before(model: nn.Module) -> Any:
    outer = torch.compile(model, backend="eager")
    logits(outer, tiny.text_batch())
    return modes_fx.optimize(outer, PLAN)


def compiled_in_place_before(model: nn.Module) -> Any:
    model.compile(backend="eager")
    return modes_fx.optimize(model, PLAN)


def compiled_between(model: nn.Module) -> Any:
    compiled = torch.compile(modes_fx.optimize(model, OTHER), backend="eager", fullgraph=True)
    logits(compiled, tiny.text_batch())
    modes_fx.restore(model)
    logits(compiled, tiny.text_batch())
    modes_fx.optimize(model, PLAN)
    return compiled


def the_stack_alone(model: nn.Module) -> Any:
    modes_fx.optimize(model, PLAN)
    model.model.compile(backend="eager", fullgraph=True)
    return model


def its_blocks_alone(model: nn.Module) -> Any:
    for layer in model.model.layers:
        layer.mlp.compile(backend="eager", fullgraph=True)
    return modes_fx.optimize(model, PLAN)


ORDERS: list[Callable[[nn.Module], Any]] = [
    compiled_after, compiled_in_place_after, forward_compiled_after, forward_compiled_before, compiled_before,
    compiled_and_called_before, compiled_in_place_before, compiled_between, the_stack_alone, its_blocks_alone,
]  # fmt: skip


@WITHOUT_INDUCTOR
@pytest.mark.parametrize("order", beyond({"compiled_after", "compiled_before"}, ORDERS, lambda order: order.__name__))
def test_in_whatever_order_the_pairs_that_the_oracle_drops_are_skipped(order: Callable[[nn.Module], Any]) -> None:
    ids = tiny.text_batch()["input_ids"]
    text_model = tiny.make("qwen3_moe")
    stock = logits(text_model, tiny.text_batch())
    judge = oracle.Oracle(text_model, PLAN.bounds(2))
    expected = judge(torch.zeros_like(ids), input_ids=ids, use_cache=False).logits
    model = order(text_model)
    with modes_fx.stats(model) as stats:
        actual = logits(model, tiny.text_batch())
    assert 0 < stats.skip_ratio() < 1
    assert stats.pairs_kept.equal(judge.kept)
    assert relative_error(actual, expected, ids >= 0) <= 1e-5
    assert modes_fx.restore(model) is model
    assert relative_error(logits(model, tiny.text_batch()), stock, ids >= 0) <= 1e-5
    assert type(text_model) is type(tiny.make("qwen3_moe"))


@WITHOUT_INDUCTOR
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


@WITHOUT_INDUCTOR
def test_a_restored_model_compiles_as_stock() -> None:
    model = tiny.make("qwen3_moe")
    stock = logits(model, tiny.text_batch())
    modes_fx.restore(modes_fx.optimize(model, PLAN))
    actual = logits(torch.compile(model, backend="eager", fullgraph=True), tiny.text_batch())
    assert (actual - stock).abs().max() <= 1e-5


@WITHOUT_INDUCTOR
def test_a_model_restored_after_generate_compiled_it_generates_as_stock() -> None:
    model, inputs = tiny.make("qwen3_moe"), tiny.text_batch()
    settings = {"cache_implementation": "static", "compile_config": by_itself(backend="eager")}
    stock = generated(model, inputs, **settings)
    modes_fx.optimize(model, SkipPlan.uniform(text=math.inf, vision=math.inf))
    assert not generated(model, inputs, **settings).equal(stock)
    modes_fx.restore(model)
    assert generated(model, inputs, **settings).equal(stock)


@WITHOUT_INDUCTOR
@pytest.mark.parametrize("case", ["deepseek", "llama4"])
def test_converted_blocks_skip_in_an_outer_graph_too(case: str) -> None:
    model = CASES[case].make()
    del model.model.layers[2:]
    modes_fx.optimize(model, PLAN)
    inputs = tiny.text_batch()
    with modes_fx.stats(model) as alone:
        expected = logits(model, inputs)
    with modes_fx.stats(model).reset() as stats:
        actual = logits(torch.compile(model, backend="eager"), inputs)
    assert (actual - expected).abs().max() <= 1e-5
    assert stats.pairs_kept.equal(alone.pairs_kept)


@pytest.mark.wide
@WITHOUT_INDUCTOR
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_model_holds_its_thresholds(strict: bool) -> None:
    model, inputs = tiny.make("qwen3_moe"), tiny.text_batch()
    stock = logits(model, inputs)
    modes_fx.optimize(model, PLAN)
    expected = logits(model, inputs)
    with torch.no_grad():
        exported = torch.export.export(model, (), {**inputs, "use_cache": False}, strict=strict)
        assert relative_error(exported.module()(**inputs, use_cache=False).logits, expected, inputs["input_ids"] >= 0) <= 1e-5
        taken_apart = exported.run_decompositions()
        assert not [node for node in taken_apart.graph.nodes if "modes_fx.keep" in str(node.target)]
        assert (
            relative_error(taken_apart.module()(**inputs, use_cache=False).logits, expected, inputs["input_ids"] >= 0) <= 1e-5
        )
    assert relative_error(expected, stock, inputs["input_ids"] >= 0) > 1e-3


@pytest.mark.wide
@WITHOUT_INDUCTOR
def test_a_model_compiled_ahead_of_time_holds_its_thresholds(tmp_path: Path) -> None:
    model, inputs = tiny.one_layer(), tiny.text_batch()
    modes_fx.optimize(model, PLAN)
    expected = logits(model, inputs)
    with torch.no_grad():
        exported = torch.export.export(model, (), {**inputs, "use_cache": False})
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
        actual = torch._inductor.aoti_load_package(package)(**inputs, use_cache=False).logits
    assert relative_error(actual, expected, inputs["input_ids"] >= 0) <= 1e-5


@WITHOUT_INDUCTOR
def test_modes_that_see_every_operation_see_the_thresholds() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, inputs = modes_fx.optimize(tiny.make("qwen3_moe"), PLAN), tiny.text_batch()
    expected = logits(model, inputs)
    with FlopCounterMode(display=False) as counter:
        actual = logits(model, inputs)
    assert counter.get_total_flops() > 0
    assert (actual - expected).abs().max() <= 1e-5


@pytest.mark.wide
@WITHOUT_INDUCTOR
def test_sizes_and_phases_end_in_a_few_graphs() -> None:
    model = modes_fx.optimize(tiny.make("qwen3_moe"), PLAN)
    outer = torch.compile(model, backend="eager", fullgraph=True)
    counters.clear()
    for rows, length in ((2, 9), (3, 5), (1, 7), (4, 4)):
        logits(outer, tiny.text_batch(rows, length))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 3  # as stock: the first sizes, any sizes, one sequence
    for rows, length in ((5, 8), (1, 12), (2, 31), (6, 3)) * 5:
        logits(outer, tiny.text_batch(rows, length))
    assert counters["stats"]["unique_graphs"] == graphs


@WITHOUT_INDUCTOR
def test_a_budget_is_kept_in_one_graph_as_it_is_eagerly() -> None:
    from tests.plan.test_budget import searched

    model, inputs = modes_fx.optimize(tiny.make()), tiny.mixed_batch(seed=5)
    plan = searched(model, inputs)
    modes_fx.set_plan(model, plan, 0.5)
    with modes_fx.stats(model) as eager:
        expected = logits(model, inputs)
    torch._dynamo.reset()
    model.model.language_model.compile(backend="eager", fullgraph=True)  # the whole model, as stock, is several
    with modes_fx.stats(model).reset() as stats:
        actual = logits(model, inputs)
    assert stats.pairs_kept.equal(eager.pairs_kept)
    assert relative_error(actual, expected, tiny.classes(inputs) != 2) <= 1e-5
