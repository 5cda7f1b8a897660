"""The static dispatch as CUDA would run it: nothing in it waits for data, and rows that no GEMM fills leave no trace."""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

import modes_fx
from modes_fx.passes.values import complete
from tests import harness, oracle, tiny
from tests.passes.conftest import STOCK, Routing, assert_close, expected, tolerance

aten = torch.ops.aten
WAITS = {
    *("item", "tolist", "nonzero", "argwhere", "masked_select", "unique", "bincount", "cpu"),
    *(torch.nonzero, torch.argwhere, torch.masked_select, torch.unique, torch.bincount),
    *(aten._local_scalar_dense, aten.item, aten.nonzero, aten.masked_select, aten._unique2, aten.bincount),
}
"""What makes the host wait for the device, or a length depend on data."""

BOUNDS = torch.tensor([0.25, 0.4, math.inf])
FORMS = [(stock, dtype) for stock in STOCK for dtype in (torch.float32, torch.bfloat16)]

every_form = pytest.mark.parametrize(("stock", "dtype"), FORMS, ids=lambda value: str(value).removeprefix("torch."))


class Experts:
    """Tiny experts in a stock form, with random routing of text, vision and padding."""

    def __init__(self, stock: str, dtype: torch.dtype, tokens: int = 8) -> None:
        self.experts = oracle.experts_of(tiny.make("olmoe", dtype))[0]
        self.experts.config._experts_implementation = stock
        self.routing = Routing.random(tokens, dtype, seed=2)
        self.classes = torch.arange(tokens) % 3
        self.keep = oracle.at_least(self.routing.weights, BOUNDS[self.classes])
        self.runtime = harness.FixedRuntime(self.classes, BOUNDS)

    def __call__(self, compile_graph: Callable[..., Any], *, dynamic: bool = False) -> Tensor:
        """Run with the static dispatch; ``compile_graph`` gets the rewritten graph."""
        run = harness.compiled_block(self.experts, "static", self.runtime, compile_graph)
        inputs = self.routing.hidden, self.routing.ids, self.routing.weights
        for tensor in inputs if dynamic else ():
            torch._dynamo.mark_dynamic(tensor, 0)
        with torch.no_grad():
            return run(*inputs)

    def check(self, out: Tensor, dtype: torch.dtype) -> None:
        assert 0 < int(self.keep.sum()) < self.keep.numel()
        assert_close(out, expected(self.experts, self.routing, self.keep), dtype)


def assert_waits_for_nothing(graph: fx.Graph, value_of: str) -> None:
    complete(graph.nodes)
    for node in graph.nodes:
        target = getattr(node.target, "overloadpacket", node.target)
        assert target not in WAITS, node.format_node()
        assert not any(free_unbacked_symbols(value) for value in _sized(node.meta.get(value_of))), node.format_node()
        if target in (operator.getitem, operator.setitem, aten.index, aten.index_put):
            indices = node.args[1] if isinstance(node.args[1], Sequence) else [node.args[1]]
            values = [index.meta[value_of] for index in indices if isinstance(index, fx.Node)]
            assert all(value.dtype is torch.int64 for value in values), node.format_node()  # a mask's length is data


def _sized(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _sized(item)
    elif isinstance(value, (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
        yield value


@every_form
@pytest.mark.parametrize("dynamic", [False, True], ids=["8 tokens", "any number"])
def test_the_rewritten_graph_and_what_it_is_lowered_to_wait_for_no_data(stock: str, dtype: torch.dtype, dynamic: bool) -> None:
    graphs: list[tuple[fx.Graph, str]] = []

    def lower(module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        def keep(lowered: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            graphs.append((lowered.graph, "val"))
            return lowered.forward

        graphs.append((module.graph, "example_value"))
        return aot_autograd(fw_compiler=keep)(module, list(inputs))

    case = Experts(stock, dtype)
    case.check(case(lower, dynamic=dynamic), dtype)
    assert [value_of for _, value_of in graphs] == ["example_value", "val"]
    for graph, value_of in graphs:
        assert_waits_for_nothing(graph, value_of)


def test_the_compact_dispatch_would_be_noticed() -> None:
    experts = Experts("grouped_mm", torch.float32)
    routing = experts.routing
    found = harness.capture(experts.experts.forward, routing.hidden, routing.ids, routing.weights, dispatch="compact")
    with pytest.raises(AssertionError, match="sort_pairs"):
        assert_waits_for_nothing(found.module.graph, "example_value")


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@every_form
def test_rows_that_no_gemm_fills_do_not_reach_the_output(stock: str, dtype: torch.dtype, garbage: float) -> None:
    """As on CUDA, where memory past the last offset is left as it was; batched rows of dropped pairs are spoilt likewise."""
    case = Experts(stock, dtype)
    spoilt: list[int] = []

    def spoil(module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        class Spoiling(fx.Interpreter):
            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                out = super().call_function(target, args, kwargs)
                if target in harness.GEMMS:
                    tail = torch.arange(len(out)) >= kwargs["offs"][-1]
                elif target is torch.bmm:
                    tail = ~case.keep.flatten()
                else:
                    return out
                spoilt.append(int(tail.sum()))
                out = out.clone()
                out[tail] = garbage
                return out

        return lambda *values: Spoiling(module).run(*values)

    case.check(case(spoil), dtype)
    assert spoilt == [int((~case.keep).sum())] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_graph_that_cuda_gets_is_rewritten_too(dtype: torch.dtype) -> None:
    """There ``histc`` counts int32 ids. No CPU kernel does, so the graph is changed after the trace and histc imitated."""
    case = Experts("grouped_mm", dtype)

    def imitate(module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        class Counting(fx.Interpreter):
            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                if target is not torch.histc:
                    return super().call_function(target, args, kwargs)
                assert args[0].dtype is torch.int32
                return torch.histc(args[0].float(), **kwargs).int()

        return lambda *values: Counting(module).run(*values)

    def cuda(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        (histc,) = (node for node in module.graph.nodes if node.target is torch.histc)
        (ids,) = histc.all_input_nodes
        assert ids.target == "float"
        ids.target = "int"
        for node in (ids, histc):
            with node.meta["example_value"].fake_mode:
                node.meta["example_value"] = node.meta["example_value"].int()
        return harness.Marked(case.runtime, "static", imitate)(module, inputs)

    routing = case.routing
    with torch.no_grad():
        out = harness.compiled(case.experts.forward, cuda, dynamic=False)(routing.hidden, routing.ids, routing.weights)
    (graph,) = case.runtime.graphs
    assert [(record.status, record.dispatch) for record in graph] == [("rewritten", "static")]
    case.check(out, dtype)


def test_a_whole_decoding_model_in_the_batched_form_waits_for_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[fx.Graph] = []

    def keep(module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        graphs.append(module.graph)
        return module.forward

    monkeypatch.setattr("modes_fx.graph.stock.inductor", keep)
    model = tiny.make("qwen3_moe")
    model.set_experts_implementation("batched_mm")
    inputs = tiny.text_batch(2, 1)
    stock = harness.logits(model, inputs)
    options = {"plan": modes_fx.SkipPlan.uniform(text=0.0, vision=0.0), "dispatch": "static"}
    ours = harness.logits(torch.compile(model, backend="modes_fx", options=options), inputs)
    assert harness.relative_error(ours, stock, torch.ones(2, 1) == 1) <= tolerance(torch.float32)
    (graph,) = graphs
    assert sum(node.target is torch.bmm for node in graph.nodes) >= 2 * len(oracle.experts_of(model))
    assert_waits_for_nothing(graph, "example_value")
