"""Values of new nodes: computed when asked for, from what the arguments are then; and all of them for Inductor."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import modes_fx
from modes_fx.graph import backend, hook
from modes_fx.passes.emit import Emitter
from modes_fx.passes.values import complete, forget, set_value, value_of
from tests import harness, tiny


def traced(function: Any, *args: Tensor) -> fx.Graph:
    """Return dynamo's graph of a function."""
    graphs: list[fx.Graph] = []

    def keep(module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(module.graph)
        return module.forward

    harness.compiled(function, keep, dynamic=False)(*args)
    return graphs[0]


def calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op in ("call_function", "call_method")]


def test_a_new_node_is_computed_when_asked_for_from_what_it_takes_then() -> None:
    graph = traced(lambda x, y: (torch.relu(x), torch.relu(y)), torch.randn(3, 4), torch.randn(5, 4))
    first, second = calls(graph)
    added, new = Emitter(before=second.next).trace(lambda x: (x + 1, torch.cat([x + 1, x], dim=0)), first)
    assert "example_value" not in {*added.meta, *new.meta}
    assert value_of(new).shape == (6, 4)
    assert "example_value" not in added.meta
    new.replace_input_with(first, second)
    new.replace_input_with(new.args[0][0], added)
    forget(new)
    assert value_of(new).shape == (8, 4)
    assert value_of(added).shape == value_of(first).shape == (3, 4)


def test_values_that_dynamo_left_out_stay_out_and_nothing_is_run_for_them() -> None:
    graph = traced(lambda x: torch.relu(x), torch.randn(3, 4))
    (relu,) = calls(graph)
    del relu.meta["example_value"]
    assert value_of(relu) is None
    complete(graph.nodes)
    assert "example_value" not in relu.meta
    set_value(relu, 5)
    assert value_of(relu) == 5


def test_lengths_that_depend_on_data_are_new_sizes_and_one_for_all_that_share_them() -> None:
    def picked(x: Tensor) -> Tensor:
        return x[(x[:, 0] > 0).nonzero().squeeze(1)]

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        graph = traced(picked, torch.randn(3, 4))
    rows = calls(graph)[-1]
    (doubled,) = Emitter(before=rows.next).trace(lambda rows: rows + rows, rows)
    assert value_of(doubled).shape[0].node.expr == value_of(rows).shape[0].node.expr


@pytest.mark.parametrize("way", ["region", "hook"])
def test_inductor_gets_a_value_of_whatever_has_a_method_called(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it caches no graph: AOTAutograd's cache tells tensors from other things by that."""
    graphs: list[fx.Graph] = []

    def keep(module: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        graphs.append(module.graph)
        return module.forward

    model, inputs = modes_fx.optimize(tiny.one_layer()), tiny.text_batch()
    if way == "region":
        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", keep)
        harness.logits(model, inputs)
    else:

        def hooked(module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            assert hook.is_marked(module.graph)
            hook.SkipMarked()(module.graph)
            return keep(module)

        harness.logits(torch.compile(model, backend=hooked, fullgraph=True), inputs)
    (graph,) = graphs
    assert any("modes_fx" in str(node.target) for node in calls(graph))
    called = [node.args[0] for node in calls(graph) if node.op == "call_method"]
    assert [node for node in called if "example_value" not in node.meta] == []


def test_what_nobody_asks_for_is_not_computed() -> None:
    graphs: list[fx.Graph] = []

    def keep(module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        graphs.append(module.graph)
        return module.forward

    with pytest.MonkeyPatch.context() as patch:
        harness.compile_with(patch, keep)
        model = modes_fx.optimize(tiny.one_layer())
        harness.logits(model, tiny.text_batch())
    (graph,) = graphs
    assert [node for node in calls(graph) if "example_value" not in node.meta]
    assert backend.last_sites()[0].status == "rewritten"
