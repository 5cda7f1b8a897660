"""The static dispatch with the Triton programs of an NVIDIA GPU, run by Triton's interpreter; what is left to torch."""

from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import fx

pytest.importorskip("triton")

import modes_fx
from modes_fx.graph import backend, stock
from modes_fx.graph.backend import inductor_settings
from modes_fx.passes import kept_blocks
from tests import harness, oracle, tiny
from tests.harness import logits, plan_of, relative_error

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

ops = torch.ops.modes_fx
FORMS = pytest.mark.parametrize("form", [harness.SORTED, harness.PAIRS])


@pytest.mark.usefixtures("without_inductor")
@FORMS
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "gpt_oss"])
def test_a_model_skips_what_the_oracle_drops(family: str, form: str) -> None:
    inputs = tiny.mixed_batch(seed=11) if family == "qwen3_vl_moe" else tiny.text_batch()
    classes = tiny.classes(inputs)
    bounds = oracle.random_bounds(tiny.make(family), classes, seed=3, **inputs)
    judge = oracle.Oracle(tiny.make(family), bounds)
    wanted = judge(classes, **inputs, use_cache=False).logits
    with harness.kernels(form):
        model = modes_fx.optimize(tiny.make(family), plan_of(bounds), dispatch="static")
        with modes_fx.stats(model) as stats:
            actual = logits(model, inputs)
    assert relative_error(actual, wanted, classes != 2) <= 1e-4
    assert stats.pairs_kept.equal(judge.kept)
    assert "static, Triton kernels" in str(modes_fx.report(model))


def graph(family: str, form: str) -> fx.Graph:
    """Return the rewritten graph of one MoE block."""
    experts = oracle.experts_of(tiny.make(family))[-1]
    experts.config._experts_implementation = "grouped_mm"
    graphs: list[fx.Graph] = []

    def keep(module: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        graphs.append(module.graph)
        return enough

    run = harness.compiled_block(experts, form, harness.FixedRuntime(), keep, dynamic=False)
    with torch.no_grad(), pytest.raises(InterruptedError):
        run(torch.randn(1, 32), torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.4]]))
    return graphs[0]


def enough(*inputs: Any) -> Any:
    raise InterruptedError


def calls(family: str, form: str) -> list[str]:
    """Return what the rewritten graph of one MoE block calls, by name."""
    targets = [node.target for node in graph(family, form).nodes if node.op.startswith("call_")]
    return [str(getattr(target, "__name__", target)).removesuffix(".default") for target in targets]


def test_gating_is_done_in_the_product() -> None:
    named = calls("qwen3_vl_moe", harness.SORTED)
    assert [name for name in named if name in dir(ops)] == ["cut_rows", "block_linear", "block_linear", "pair_sum"]
    assert not {"silu", "chunk", "_grouped_mm", "grouped_mm_fallback"} & set(named)


def test_few_pairs_are_not_sorted() -> None:
    named = calls("qwen3_vl_moe", harness.PAIRS)
    assert [name for name in named if name in dir(ops)] == ["pair_linear", "pair_combine"]
    assert not {"silu", "sort", "histc", "cumsum"} & set(named)


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        (harness.SORTED, ["cut_rows", "block_linear", "block_linear", "pair_sum"]),
        (harness.PAIRS, ["pair_linear", "pair_combine"]),
    ],
)
def test_clamps_and_biases_are_in_the_product_too(form: str, wanted: list[str]) -> None:
    named = calls("gpt_oss", form)
    assert [name for name in named if name in dir(ops)] == wanted
    assert not {"sigmoid", "clamp", "add_", "mul"} & set(named)


@FORMS
@pytest.mark.parametrize("mode", ["max-autotune", "reduce-overhead"])
def test_max_autotune_lets_the_first_call_choose_the_sizes(mode: str, form: str) -> None:
    with inductor_config.patch(inductor_settings(mode, {})):
        ours = [node for node in graph("qwen3_vl_moe", form).nodes if str(node.target).startswith("modes_fx.")]
    sizes = [len(node.args[-1]) for node in ours if isinstance(node.args[-1], (list, tuple))]
    numbers = 5 if form == harness.SORTED else 3
    assert len(sizes) == 2
    assert all(size > numbers for size in sizes) if mode == "max-autotune" else sizes == [numbers, numbers]


def test_the_passes_see_the_mode_of_a_region_and_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(backend, "skip_experts", lambda graph: seen.append(inductor_config.max_autotune) or ())
    monkeypatch.setattr(stock, "inductor", harness.uncompiled)
    compile_region = backend.SkipBackend(lambda sites: None, harness.uncompiled, **inductor_settings("max-autotune", {}))
    compile_region(fx.GraphModule({}, fx.Graph()), [])
    stock.modes_fx(fx.GraphModule({}, fx.Graph()), [], mode="max-autotune")
    assert (seen, inductor_config.max_autotune) == ([True, True], False)


def test_few_pairs_are_no_more_than_experts() -> None:
    assert [kept_blocks.takes_pairs(pairs, 128) for pairs in (8, 128, 129)] == [True, True, False]


@pytest.mark.usefixtures("without_inductor")
def test_on_a_cpu_the_static_dispatch_is_torchs_own() -> None:
    model = modes_fx.optimize(tiny.make("qwen3_moe"), dispatch="static")
    assert {site.gemms for site in modes_fx.report(model).sites} == {
        "not on an NVIDIA GPU of compute capability 8.0 or more, with Triton"
    }


@pytest.mark.parametrize(
    ("capability", "hip", "taken"),
    [((9, 0), None, (9, 0)), ((8, 0), None, (8, 0)), ((7, 5), None, None), ((9, 4), "6.4", None)],
)
def test_which_cards_run_the_programs(
    capability: tuple[int, int], hip: str | None, taken: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert kept_blocks._capability.__wrapped__(torch.device("cuda", 0)) == taken
    assert kept_blocks._capability.__wrapped__(torch.device("xpu", 0)) is None


def test_gradients_are_left_to_torch() -> None:
    experts = oracle.experts_of(tiny.make("qwen3_moe"))[-1]
    experts.config._experts_implementation = "grouped_mm"
    runtime = harness.FixedRuntime()
    run = harness.compiled_block(experts, harness.SORTED, runtime, dynamic=False)
    run(torch.randn(1, 32, requires_grad=True), torch.tensor([[0, 1]]), torch.tensor([[0.6, 0.4]]))
    assert [record.gemms for record in runtime.graphs[0]] == [
        "gradients are on: run under torch.no_grad() or torch.inference_mode()"
    ]
