"""Inductor's hook: in force for marked graphs alone, behind whatever was set, and part of the key of what is cached."""

import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass

import modes_fx
from modes_fx.graph import hook
from modes_fx.plan import PlanPoint, SkipPlan
from modes_fx.policies import RULES, Rule, register
from modes_fx.policies.registry import _KEYS
from tests import harness, tiny
from tests.harness import logits

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo", "without_inductor"),
    pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled:UserWarning"),
]


class Named(CustomGraphPass):
    """A hook of somebody else's."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: list[fx.Graph] = []

    def __call__(self, graph: fx.Graph) -> None:
        self.seen.append(graph)

    def uuid(self) -> Any:
        return self.name


@pytest.fixture
def no_hook() -> Iterator[None]:
    with inductor_config.patch(pre_grad_custom_pass=None):
        yield


@pytest.mark.usefixtures("no_hook")
def test_it_runs_behind_the_hooks_that_were_set_and_is_set_once() -> None:
    theirs = Named("theirs")
    inductor_config.pre_grad_custom_pass = theirs
    for _ in range(2):
        hook.install()
    mine = inductor_config.pre_grad_custom_pass
    assert isinstance(mine, hook.SkipMarked)
    graph = fx.Graph()
    mine(graph)
    assert theirs.seen == [graph]
    inductor_config.pre_grad_custom_pass = [theirs, mine]
    hook.install()
    assert inductor_config.pre_grad_custom_pass == [theirs, mine]


@pytest.mark.usefixtures("no_hook")
def test_a_hook_that_is_set_afterwards_does_not_put_it_out_of_force() -> None:
    model = modes_fx.optimize(tiny.make("qwen3_moe"))
    inductor_config.pre_grad_custom_pass = theirs = Named("theirs")
    logits(torch.compile(model, backend=harness.ungenerated, fullgraph=True), tiny.text_batch())
    (graph,) = theirs.seen
    targets = harness.targets(fx.GraphModule({}, graph))
    assert targets.count(torch.ops.modes_fx.sort_pairs.default) == 2


def test_other_settings_of_inductor_are_left_alone() -> None:
    before = {name: value for name, value in inductor_config.get_config_copy().items() if name != "pre_grad_custom_pass"}
    modes_fx.restore(modes_fx.optimize(tiny.make("qwen3_moe")))
    after = {name: value for name, value in inductor_config.get_config_copy().items() if name != "pre_grad_custom_pass"}
    assert after == before


def test_a_graph_without_a_marker_stays_as_it_is() -> None:
    graph = fx.symbolic_trace(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())).graph
    before = str(graph)
    hook.SkipMarked()(graph)
    assert str(graph) == before


def keeping(share: float) -> Rule:
    def above_a_share(weights_TK: Tensor, bound_T: Tensor) -> Tensor:
        return weights_TK >= share * weights_TK.amax(dim=1, keepdim=True)

    return Rule(above_a_share, 0.0, math.inf)


@pytest.mark.usefixtures("rules")
def test_its_identity_changes_with_rules_and_with_other_hooks() -> None:
    mine = hook.SkipMarked()
    before = mine.uuid()
    assert mine.uuid() == before
    register("mine", keeping(0.5))
    half = mine.uuid()
    assert half != before
    _KEYS["mine"] = RULES["mine"] = keeping(1.0)  # the same source, another value in its closure
    assert mine.uuid() != half
    assert hook.SkipMarked([Named("theirs")]).uuid() != mine.uuid()
    assert hook.SkipMarked([lambda graph: None]).uuid() is None  # nobody knows what it does: nothing may be cached


def test_its_identity_changes_with_every_source(monkeypatch: pytest.MonkeyPatch) -> None:
    before, read = hook._sources.__wrapped__(), Path.read_bytes
    for name in ("experts.cpp", "programs.py", "threshold.py"):
        monkeypatch.setattr(Path, "read_bytes", lambda path, name=name: read(path) + b"#" * (path.name == name))
        assert hook._sources.__wrapped__() != before


@pytest.mark.wide
@pytest.mark.usefixtures("rules")
def test_another_rule_does_not_get_a_cached_graph() -> None:
    inputs, found = tiny.text_batch(), []
    fresh = {"cache_key_tag": str(uuid.uuid4())}  # no graph is cached yet, but all that goes with them is: headers, kernels
    for share in (1.0, 1.0, 0.0):  # as three processes would, each of which names one rule so
        torch._dynamo.reset()
        counters.clear()
        _KEYS.pop("mine", None)
        RULES.pop("mine", None)
        register("mine", keeping(share))
        model = modes_fx.optimize(tiny.one_layer(), SkipPlan((PlanPoint(None, 0.0, 0.0),), rule="mine"))
        with torch.compiler.config.patch(fresh), inductor_config.patch(fx_graph_cache=True):
            found.append(logits(torch.compile(model, fullgraph=True), inputs))
        hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
        assert bool(hits) == (len(found) == 2)
    assert found[0].equal(found[1])
    stock = logits(tiny.one_layer(), inputs)
    assert harness.relative_error(found[2], stock, inputs["input_ids"] >= 0) <= 1e-5
    assert harness.relative_error(found[0], stock, inputs["input_ids"] >= 0) > 1e-2


def test_a_marked_dispatch_that_cannot_be_rewritten_computes_the_same_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    from modes_fx.passes import grouped_mm
    from modes_fx.passes.site import Reject

    def refuse(anchor: fx.Node) -> Any:
        raise Reject("NOT_A_DISPATCH", "as a test wants it", anchor)

    model, inputs = modes_fx.optimize(tiny.one_layer(), SkipPlan.uniform(text=0.25, vision=0.4)), tiny.text_batch()
    expected = logits(model, inputs)
    with pytest.MonkeyPatch.context() as patch, inductor_config.patch(force_disable_caches=True):
        patch.setattr(grouped_mm, "match", refuse)
        actual = logits(torch.compile(model, fullgraph=True), inputs)
    assert harness.relative_error(actual, expected, inputs["input_ids"] >= 0) <= 1e-5
    assert "1 of 1 marked dispatches compute all pairs: NOT_A_DISPATCH: as a test wants it" in caplog.text
