"""The bare backend, found by name through its entry point."""

import types

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor import compile_fx

import modes_fx
from modes_fx.errors import ModalityError
from modes_fx.graph.stock import Marking
from modes_fx.plan import PlanPoint, SkipPlan
from tests import tiny
from tests.harness import plan_of, relative_error, uncompiled
from tests.oracle import Oracle, experts_of, random_bounds

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

LAYERS = tuple(f"model.layers.{i}.mlp.experts" for i in range(2))


@pytest.fixture
def uncompiled_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the rewritten graphs as they are, where Inductor's code is not the point: compiling a model takes a second."""
    monkeypatch.setattr("modes_fx.graph.stock.inductor", uncompiled)


def run(model: nn.Module, options: dict[str, object], **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.compile(model, backend="modes_fx", options=options)(**inputs, use_cache=False).logits


def test_a_plan_by_layer_skips_what_the_oracle_drops() -> None:
    model = tiny.make("qwen3_moe")
    ids = tiny.text_batch(2, 5)["input_ids"]
    classes = torch.zeros_like(ids)
    bounds = random_bounds(model, classes, input_ids=ids)
    by_layer = plan_of(bounds)
    plan = SkipPlan(by_layer.points, by_layer.alpha, LAYERS)
    wanted = Oracle(model, bounds)(classes, input_ids=ids).logits
    assert (
        relative_error(run(model, {"plan": plan, "vision_token_ids": [tiny.IMAGE]}, input_ids=ids), wanted, classes == 0) < 1e-5
    )


@pytest.mark.usefixtures("uncompiled_graphs")
def test_a_dispatch_that_is_switched_is_compiled_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.make("qwen3_moe")
    ids = tiny.text_batch(2, 5)["input_ids"]
    classes = torch.zeros_like(ids)
    bounds = random_bounds(model, classes, input_ids=ids)
    bounds[:] = bounds[:1, :1]  # the same for all layers: embeddings of any graph will do
    wanted = Oracle(model, bounds)(classes, input_ids=ids).logits
    plan = SkipPlan.uniform(text=float(bounds[0, 0]), vision=float(bounds[0, 0]))
    compiled = torch.compile(model, backend="modes_fx", options={"plan": plan})
    graphs = []
    for form in ("grouped_mm", "batched_mm", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(form)
        with torch.no_grad():
            actual = compiled(input_ids=ids, use_cache=False).logits
        assert relative_error(actual, wanted, classes == 0) < 1e-5
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[2] == graphs[3]
    assert not [
        record for record in caplog.records if record.name.startswith("modes_fx")
    ]  # no graph with experts was left as it was


def test_without_a_plan_everything_is_kept() -> None:
    model = tiny.one_layer()
    ids = tiny.text_batch(1, 4)["input_ids"]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    assert relative_error(run(model, {"max_autotune": False}, input_ids=ids), wanted, ids >= 0) < 1e-5


@pytest.mark.usefixtures("uncompiled_graphs")
def test_modality_without_placeholder_ids_is_an_error_that_says_what_to_pass() -> None:
    model = tiny.make("qwen3_moe")
    plan = SkipPlan.uniform(text=0.1, vision=0.3)
    with pytest.raises(ModalityError, match="vision_token_ids"):
        run(model, {"plan": plan}, input_ids=tiny.text_batch(1, 4)["input_ids"])


@pytest.mark.usefixtures("uncompiled_graphs")
def test_embeddings_after_ids_do_not_get_the_older_modality() -> None:
    model = tiny.make("qwen3_moe")
    ids = tiny.text_batch(1, 4)["input_ids"]
    options = {"plan": SkipPlan.uniform(text=0.1, vision=0.3), "vision_token_ids": [tiny.IMAGE]}
    compiled = torch.compile(model, backend="modes_fx", options=options)
    embeds = model.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        compiled(input_ids=ids, use_cache=False)
        with pytest.raises(ModalityError, match="token_modality"):
            compiled(inputs_embeds=embeds, use_cache=False)
        with modes_fx.token_modality(torch.zeros_like(ids)):
            assert compiled(inputs_embeds=embeds, use_cache=False).logits.isfinite().all()


@pytest.mark.usefixtures("uncompiled_graphs")
def test_forwards_of_another_shape_than_the_tokens_given_use_their_own_ids() -> None:
    model = tiny.make("qwen3_moe")
    ids = tiny.text_batch(1, 4)["input_ids"]
    options = {"plan": SkipPlan.uniform(text=0.1, vision=0.3), "vision_token_ids": [int(ids[0, 1])]}
    wanted = run(model, options, input_ids=ids)
    with modes_fx.token_modality(torch.ones(1, 9, dtype=torch.int64)):
        assert run(model, options, input_ids=ids).equal(wanted)


@pytest.mark.usefixtures("uncompiled_graphs")
@pytest.mark.parametrize("alike", [False, True])
def test_a_model_does_not_get_the_tokens_of_another(alike: bool) -> None:
    first, second = tiny.make("qwen3_moe"), tiny.make("qwen3_moe")
    ids = tiny.text_batch(1, 4)["input_ids"]
    plan = SkipPlan((PlanPoint(None, 0.1, 0.3),), ((0.5, 0.5), (0.5, 0.5)), LAYERS)
    run(first, {"plan": plan, "vision_token_ids": [tiny.IMAGE]}, input_ids=ids)
    options = {"plan": plan, "vision_token_ids": [tiny.IMAGE] if alike else [tiny.IMAGE, 1]}
    with pytest.raises(ModalityError, match="token_modality"):
        run(second, options, inputs_embeds=second.get_input_embeddings()(ids).detach())


def test_what_layers_share_is_copied_to_their_device_once() -> None:
    graph = fx.Graph()
    graph.placeholder("ids")._dynamo_source = types.SimpleNamespace(name="L['input_ids']")
    graph.output(())
    marking = Marking(fx.GraphModule({}, graph), SkipPlan.uniform(text=0.5, vision=0.5))
    hidden = torch.empty(3, 4, device="meta")
    marking.around(lambda *inputs: ())(torch.tensor([[1, 2, 3]]))
    classes = [marking.classes(hidden, layer) for layer in "ab"]
    assert classes[0] is classes[1]
    assert classes[0].device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.5}, r"PlanError.*A target \(0\.5\) needs a plan"),
        ({"dispach": "static"}, r"ModesFxError.*Unknown option 'dispach'"),
        ({"dispatch": "fast"}, r"ModesFxError.*Unknown dispatch 'fast'; known: auto, compact, static"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(BackendCompilerFailed, match=f"(?s){message}"):
        run(tiny.make("qwen3_moe"), options, input_ids=tiny.text_batch(1, 4)["input_ids"])


@pytest.mark.usefixtures("uncompiled_graphs")
def test_a_layer_that_cannot_be_told_is_refused() -> None:
    model = tiny.make("qwen3_moe")
    plan = SkipPlan((PlanPoint(None, 0.1, 0.1),), ((0.5, 0.5), (0.5, 0.5)), ("elsewhere.0", "elsewhere.1"))
    with pytest.raises(BackendCompilerFailed, match=r"PlanError.*importances by layer"):
        run(model, {"plan": plan}, input_ids=tiny.text_batch(1, 4)["input_ids"])


class Household(nn.Module):
    """A user's own module, which merely contains experts."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.before = nn.Linear(32, 32)
        self.router = nn.Linear(32, 6)
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        weights, ids = self.router(x).softmax(-1).topk(3)
        return x + self.experts(x, ids, weights)


def test_a_users_own_module_is_rewritten_and_reported() -> None:
    module = Household(experts_of(tiny.make("qwen3_moe"))[0])
    report, x = modes_fx.GraphReport(), torch.randn(5, 32)
    with torch.no_grad():
        everything = module(x)
        options = {"plan": SkipPlan.uniform(text=2.0, vision=2.0), "report": report}
        nothing = torch.compile(module, backend="modes_fx", options=options)(x)
    assert (nothing - module.before(x)).abs().max() <= 1e-6
    assert (everything - nothing).abs().max() > 1e-2
    assert [(site.status, site.form, site.num_experts) for site in report.sites] == [("rewritten", "grouped_mm", 6)]
    assert "1 sites found, 1 rewritten" in str(report)


@pytest.mark.usefixtures("uncompiled_graphs")
def test_a_model_in_parts_reports_what_is_rewritten_in_each() -> None:
    model = tiny.make("qwen3_moe")
    plain = model.model.layers[0].forward
    model.model.layers[0].forward = lambda *args, **kwargs: (torch._dynamo.graph_break(), plain(*args, **kwargs))[1]
    report = modes_fx.GraphReport()
    ids = tiny.text_batch(1, 4)["input_ids"]
    run(model, {"report": report}, input_ids=ids)
    sites_in_each = [len(graph) for graph in report.graphs]
    assert sorted(sites_in_each, reverse=True)[:3] == [1, 1, 0]  # a layer in a part, and parts without experts
    assert [site.status for site in report.sites] == ["rewritten"] * 2


@pytest.mark.parametrize("how", [{"mode": "no-such-mode"}, {"no_such_setting": True}])
def test_unknown_settings_of_inductor_are_refused(how: dict[str, object]) -> None:
    with pytest.raises(BackendCompilerFailed, match=r"ModesFxError: Unknown (mode|option) .no.such"):
        run(tiny.make("qwen3_moe"), how, input_ids=tiny.text_batch(1, 4)["input_ids"])


@pytest.mark.wide
def test_modes_and_options_reach_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, object]] = []

    def note(module: fx.GraphModule, inputs: object, config_patches: dict[str, object] | None = None) -> object:
        seen.append(dict(config_patches or {}))
        return module.forward

    monkeypatch.setattr(compile_fx, "compile_fx", note)
    ids = tiny.text_batch(1, 4)["input_ids"]
    run(tiny.make("qwen3_moe"), {"mode": "max-autotune-no-cudagraphs", "epilogue_fusion": False}, input_ids=ids)
    with torch.no_grad():
        torch.compile(tiny.make("qwen3_moe"), backend="modes_fx", mode="max-autotune-no-cudagraphs", dynamic=True)(ids)
        modes_fx.optimize(tiny.make("qwen3_moe"), mode="max-autotune-no-cudagraphs", options={"epilogue_fusion": False})(ids)
    assert [(settings["max_autotune"], settings.get("epilogue_fusion")) for settings in seen] == [
        (True, False), (True, None), (True, False),
    ]  # fmt: skip
