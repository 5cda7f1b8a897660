"""What stands in the graph after the rewrite, and that nothing else was touched."""

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from modes_fx.graph import marker
from modes_fx.passes.skip_experts import skip_experts
from modes_fx.passes.values import value_of
from tests import harness, oracle, tiny
from tests.passes.conftest import EXPERTS, FORMS, HIDDEN, TOP_K, Routing, form_id

TOKENS = 7
PAIRS = TOKENS * TOP_K
Form = tuple[str, str, torch.dtype]
"""The stock dispatch, the one put in its place, the dtype."""

_captured: dict[Form, harness.Capture] = {}


@pytest.fixture(params=FORMS, ids=form_id)
def form(request: pytest.FixtureRequest) -> Form:
    return request.param


def only_for(*dispatches: tuple[str, str]) -> pytest.MarkDecorator:
    """Give a test some of the forms."""
    mine = [form for form in FORMS if form[:2] in dispatches]
    return pytest.mark.parametrize("form", mine, ids=form_id, indirect=True)


@pytest.fixture
def captured(form: Form) -> harness.Capture:
    if form not in _captured:
        stock_form, dispatch, dtype = form
        experts = oracle.experts_of(tiny.make("olmoe", dtype))[0]
        experts.config._experts_implementation = stock_form
        routing = Routing.random(TOKENS, dtype)
        _captured[form] = harness.capture(experts.forward, routing.hidden, routing.ids, routing.weights, dispatch=dispatch)
    return _captured[form]


def only(module: fx.GraphModule, target: Any) -> fx.Node:
    (node,) = (node for node in module.graph.nodes if node.target == target)
    return node


def gemms(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.target in (*harness.GEMMS, *harness.KERNELS, torch.bmm)]


def gathers_of_matrices(module: fx.GraphModule) -> list[fx.Node]:
    return [gemm.args[0] for gemm in gemms(module)]


def example(node: fx.Node) -> Any:
    return value_of(node)


def test_the_site_is_recorded_as_rewritten(form: Form, captured: harness.Capture) -> None:
    (record,) = captured.records
    assert (record.status, record.code, record.form) == ("rewritten", "", form[0])
    assert (record.dispatch, record.top_k, record.num_experts) == (harness.dispatch_of(form[1]), TOP_K, EXPERTS)
    assert (record.gemms == "kernels") == (form[:2] == ("grouped_mm", "compact"))
    assert "gate_up_proj" in record.source


def test_each_form_keeps_its_own_gemm(form: Form, captured: harness.Capture) -> None:
    float32, bfloat16 = harness.GEMMS
    grouped = float32 if form[2] is torch.float32 else bfloat16
    target = grouped if form[0] == "grouped_mm" else torch.bmm
    wanted = list(harness.KERNELS) if form[:2] == ("grouped_mm", "compact") else [target, target]
    assert [node.target for node in gemms(captured.module)] == wanted


def test_the_rewrite_adds_no_input_and_takes_none_away(captured: harness.Capture) -> None:
    after = [node for node in captured.module.graph.nodes if node.op == "placeholder"]
    classes, bounds = after[captured.inputs :]  # the marker's, put there with it
    assert (example(classes).dtype, tuple(example(classes).shape)) == (torch.int64, (TOKENS,))
    assert (example(bounds).dtype, tuple(example(bounds).shape)) == (torch.float32, (3,))
    marked = [line.split()[0] for line in captured.marked.marked_text.splitlines() if " = placeholder[" in line]
    assert [f"%{node.name}" for node in after] == marked
    assert not any(node.target is marker.keep for node in captured.module.graph.nodes)


def test_thresholds_and_modality_are_inputs_never_constants(captured: harness.Capture) -> None:
    module = captured.module
    compare = only(module, operator.ge)
    assert compare.args[1].args[0].target is operator.getitem  # bounds[token_class].unsqueeze(1)
    bounds, classes = compare.args[1].args[0].args
    assert (bounds.op, classes.op) == ("placeholder", "placeholder")
    assert example(compare.args[0]).dtype is torch.float32


@only_for(("grouped_mm", harness.ATEN), ("batched_mm", "compact"))
def test_compact_gathers_kept_pairs_and_adds_them_back_in_float32(form: Form, captured: harness.Capture) -> None:
    module, names = captured.module, harness.targets(captured.module)
    assert names.count("nonzero") == 1
    stock = {torch.empty_like, operator.setitem, torch.arange, "view", "repeat_interleave"}
    assert not stock & set(names), "stock order left over"
    total, dim, rows, values = only(module, "scatter_add").args
    assert (total.target, total.kwargs["dtype"], dim) == (torch.zeros_like, torch.float32, 0)
    assert example(values).dtype is torch.float32
    token = rows.args[0].args[0]
    assert (rows.target, rows.args[0].target) == ("expand_as", "unsqueeze")
    assert (token.target, token.args[1]) == (operator.floordiv, TOP_K)
    assert names.index("scatter_add") > max(i for i, name in enumerate(names) if name in (*harness.GEMMS, torch.bmm))
    assert only(module, "nonzero").args[0].target == "reshape"  # the mask of kept pairs
    assert names.count(torch.sort) == (form[0] == "grouped_mm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_leave_nothing_of_the_stock_order(dtype: torch.dtype) -> None:
    experts = oracle.experts_of(tiny.make("olmoe", dtype))[0]
    routing = Routing.random(TOKENS, dtype)
    found = harness.capture(experts.forward, routing.hidden, routing.ids, routing.weights)
    module = found.module
    stock = {torch.sort, torch.histc, torch.cumsum, torch.empty_like, operator.setitem, torch.arange, "nonzero", "scatter_add"}
    assert not stock & set(harness.targets(module))
    up, down = gemms(module)
    x, pairs, top_k, weight, offsets = up.args
    assert (example(x).shape, top_k, example(weight).shape[0]) == ((TOKENS, HIDDEN), TOP_K, EXPERTS)
    assert (pairs.args, offsets.args) == ((pairs.args[0], 0), (pairs.args[0], 1))
    assert pairs.args[0].target is torch.ops.modes_fx.sort_pairs.default
    assert down.args[1:3] == (pairs, TOP_K)
    assert [example(node).dtype for node in (down, down.args[3])] == [torch.float32] * 2
    rows = example(up).shape[0]
    assert free_unbacked_symbols(rows)
    assert tuple(example(up).shape)[1:] == tuple(example(weight).shape)[1:2]
    assert tuple(example(down).shape) == (TOKENS, HIDDEN)


@only_for(("grouped_mm", "static"), ("batched_mm", "static"))
def test_static_keeps_fixed_shapes_and_selects_the_kept_rows(form: Form, captured: harness.Capture) -> None:
    module, names = captured.module, harness.targets(captured.module)
    assert not {"nonzero", "item", "tolist", torch.nonzero, "scatter_add", "masked_select"} & set(names)
    marked, selected = (node for node in module.graph.nodes if node.target is torch.where)
    if form[0] == "grouped_mm":
        assert marked.args[2] == EXPERTS
        assert only(module, torch.sort).args[0] is marked
    else:
        (redirected,) = marked.users
        assert [node.args[1] for node in gathers_of_matrices(module)] == [redirected, redirected]
    weighted = selected.args[1]
    assert (weighted.target, tuple(example(weighted).shape)) == (operator.mul, (PAIRS, HIDDEN))
    assert list(weighted.users) == [selected]
    assert selected.args[2] == 0.0
    (after,) = selected.users
    assert after.target == (operator.getitem if form[0] == "grouped_mm" else "view")


def test_every_node_has_fake_metadata_of_one_mode(captured: harness.Capture) -> None:
    modes = set()
    for node in captured.module.graph.nodes:
        if node.op in ("placeholder", "call_function", "call_method") and node.users:
            value = example(node)
            modes |= {item.fake_mode for item in _tensors(value) if isinstance(item, FakeTensor)}
    assert len(modes) == 1


def test_rows_have_an_unbacked_size_in_compact_and_a_fixed_one_in_static(form: Form, captured: harness.Capture) -> None:
    for gemm in gemms(captured.module):
        for value in (example(gemm), example(gemm.args[0])):
            if gemm.target in harness.KERNELS and not free_unbacked_symbols(value.shape[0]):
                assert value.shape[0] == TOKENS  # it gathers its rows from all tokens, or adds them up to all
                continue
            if form[1] != "static":
                assert free_unbacked_symbols(value.shape[0])
            else:
                assert value.shape[0] == PAIRS
    result = captured.module.graph.output_node().args[0][0]
    assert tuple(example(result).shape) == (TOKENS, HIDDEN)
    assert not free_unbacked_symbols(example(result))


def test_metadata_agrees_with_what_really_runs(form: Form, captured: harness.Capture) -> None:
    module = captured.module
    routing = Routing.random(TOKENS, form[2], seed=1)
    experts = oracle.experts_of(tiny.make("olmoe", form[2]))[0]
    values: dict[str, Tensor] = {}

    class Checked(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            result = super().run_node(node)
            if node.op != "output" and node.users:
                for real, fake in zip(_tensors(result), _tensors(example(node)), strict=True):
                    assert real.dtype == fake.dtype, node
                    assert len(real.shape) == len(fake.shape), node
                    for size, known in zip(real.shape, fake.shape, strict=True):
                        assert not isinstance(known, int) or size == known, node
                    values[node.name] = real
            return result

    with torch.no_grad():
        Checked(module).run(*(_real(node, routing, experts) for node in module.graph.nodes if node.op == "placeholder"))
    assert values


def test_the_pass_finds_nothing_more_to_rewrite_in_its_own_result(form: Form, captured: harness.Capture) -> None:
    before = harness.text(captured.module)
    assert skip_experts(captured.module.graph) == ()
    assert harness.text(captured.module) == before


def test_auto_is_compact_on_a_cpu() -> None:
    experts = oracle.experts_of(tiny.make("olmoe"))[0]
    routing = Routing.random(TOKENS, torch.float32)
    found = harness.capture(experts.forward, routing.hidden, routing.ids, routing.weights, dispatch="auto")
    assert [record.dispatch for record in found.records] == ["compact"]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [item for item in value if isinstance(item, Tensor)] if isinstance(value, (tuple, list)) else []


def _real(placeholder: fx.Node, routing: Routing, experts: nn.Module) -> Tensor:
    """Return what the experts module would be called with; its parameters by name, the rest by dtype and shape."""
    name, value = str(placeholder.target), example(placeholder)
    for key, parameter in experts.named_parameters():
        if key in name:
            return parameter
    if "modes_fx_bounds" in name:
        return torch.tensor([0.3, 0.3, 0.0])
    if value.dtype is torch.int64:
        return torch.zeros(TOKENS, dtype=torch.int64) if "modes_fx_token_class" in name else routing.ids
    return routing.hidden if value.shape[-1] == HIDDEN else routing.weights
