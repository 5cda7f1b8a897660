"""One graph of a static cache's decoding as CUDA graphs ask for it: fixed shapes, no wait for the host, inputs that stay put.

Traced on a CPU with the dispatch that a GPU gets: a build of torch without CUDA cannot trace a whole model on its fake tensors.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx
from transformers import StaticCache

import modes_fx
from modes_fx.graph.backend import rewrite
from modes_fx.graph.in_force import InForce
from modes_fx.plan import PlanPoint, SkipPlan
from tests import harness, tiny
from tests.harness import logits
from tests.passes.test_static import assert_waits_for_nothing
from tests.wide import beyond

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo", "without_inductor"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch._dynamo"),
]

PLAN = SkipPlan.uniform(text=0.25, vision=0.4)


def decoded(family: str, form: str = "static") -> tuple[Any, fx.GraphModule, list[fx.Node]]:
    """Return an optimised model, the rewritten graph of its decode step over a static cache, and the graph's inputs before."""
    dtype = torch.bfloat16 if form == "static" else torch.float32  # Triton's interpreter multiplies bfloat16 wrongly
    model = modes_fx.optimize(tiny.make(family, dtype), PLAN, dispatch="static")
    runtime = model._modes_fx.runtime
    runtime.in_force = runtime.in_force.marked_static()
    graphs: list[tuple[fx.GraphModule, list[fx.Node]]] = []

    def backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        before = [node for node in module.graph.nodes if node.op == "placeholder"]
        assert {site.status for site in rewrite(module)} == {"rewritten"}
        graphs.append((module, before))
        return module.forward

    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=16)
    with torch.no_grad(), harness.kernels(form):
        model(tiny.text_batch(2, 5)["input_ids"], past_key_values=cache)
        torch.compile(model, backend=backend, fullgraph=True)(torch.tensor([[5], [6]]), past_key_values=cache)
    ((module, before),) = graphs
    return model, module, before


@pytest.mark.parametrize("form", ["static", harness.SORTED, harness.PAIRS])
@pytest.mark.parametrize("family", beyond({"gpt_oss"}, ["qwen3_moe", "gpt_oss", "deepseek_v3"], str))
def test_nothing_waits_for_the_host_and_no_input_loses_its_mark(
    family: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form != "static":
        pytest.importorskip("triton")
    monkeypatch.setattr(InForce, "snapshot", InForce.copied)  # as elsewhere than on a CPU
    model, module, before = decoded(family, form)
    assert_waits_for_nothing(module.graph, "example_value")
    assert [node for node in module.graph.nodes if node.op == "placeholder"] == before  # dynamo's own, none added
    assert all(hasattr(node, "_dynamo_source") for node in before)
    static = {node for node in before if node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")}
    bounds = [node for node in before if "in_force" in node.name]
    assert len(bounds) == 1
    assert set(bounds) <= static
    weights = [node for node in before if isinstance(node.meta["example_value"], torch.nn.Parameter)]
    assert len(weights) == len(list(model.parameters()))


def test_on_a_cpu_no_kernel_holds_the_index_of_a_layer() -> None:
    _, _, before = decoded("qwen3_moe")
    rows = [node for node in before if "in_force" in node.name]
    assert [node.meta["example_value"].dim() for node in rows] == [1, 1]  # each layer's own: code that layers can share


def test_another_plan_is_written_where_captured_graphs_read_it() -> None:
    runtime = modes_fx.optimize(tiny.make("qwen3_moe"), PLAN)._modes_fx.runtime
    first = runtime.in_force
    address = first.bounds.data_ptr()
    other = InForce.of(runtime.rule, 2, SkipPlan.uniform(text=0.1, vision=0.2).bounds(2), (), torch.device("cpu"))
    held = first.holding(other)
    assert held.bounds.data_ptr() == address
    assert held.bounds.equal(other.bounds)


def test_a_forward_elsewhere_than_on_a_cpu_reads_a_copy_of_all_that_is_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny.make("qwen3_moe"), tiny.text_batch()
    tables = tuple(((1.0,) * 6,) * 6 for _ in range(2))
    modes_fx.optimize(model, SkipPlan((PlanPoint(None, 0.5, 0.5),), rule="diep", tables=tables))
    plan = model._modes_fx.runtime.in_force
    assert plan.snapshot() is plan
    elsewhere = replace(plan, bounds=plan.bounds.to("meta")).snapshot()
    assert elsewhere.tables[0].equal(plan.tables[0])
    assert elsewhere.tables[0].data_ptr() != plan.tables[0].data_ptr()

    expected = logits(model, inputs)
    monkeypatch.setattr(InForce, "snapshot", InForce.copied)
    assert logits(model, inputs).equal(expected)
    outer = torch.compile(model, backend="eager", fullgraph=True)
    assert (logits(outer, inputs) - expected).abs().max() <= 1e-5
