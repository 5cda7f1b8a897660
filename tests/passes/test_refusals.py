"""Near misses of the dispatch: each is refused with its code, and its graph stays as it was."""

import functools
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional

from modes_fx.passes import batched_mm
from modes_fx.passes.walk import weight_inputs
from tests import harness, oracle, tiny
from tests.passes.conftest import Routing
from tests.passes.near_misses import (
    EXPERTS,
    GMM,
    HIDDEN,
    STOCK,
    TOKENS,
    TOP_K,
    Step,
    batched,
    dispatch,
    inputs,
    refused,
    same,
    variant,
)


@pytest.fixture(params=STOCK)
def stock(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_imitation_itself_is_rewritten(stock: str) -> None:
    for form in ("compact", "static"):
        found = harness.capture(STOCK[stock], *inputs(), dispatch=form)
        assert [(record.status, record.form) for record in found.records] == [("rewritten", stock)]


@pytest.mark.parametrize(
    "changes",
    [
        {"leak": "w"},
        {"weight": torch.square},
        {"weight": lambda w: w - w.max()},
        {"weight": lambda w: 1.0 + w},
        {"body": same, "weight": torch.ones_like},
    ],
    ids=["used twice", "squared", "normalised over rows", "offset by one", "ignored"],
)
def test_weights_that_do_more_than_multiply_the_output(stock: str, changes: dict[str, Any]) -> None:
    assert variant(stock=stock, **changes) == "WEIGHTS_HAVE_OTHER_USERS"


@pytest.mark.parametrize(("stock", "code"), [("grouped_mm", "WEIGHTS_HAVE_OTHER_USERS"), ("batched_mm", "NOT_A_DISPATCH")])
def test_weights_that_scale_the_input(stock: str, code: str) -> None:
    assert variant(stock=stock, on_input=True) == code


@pytest.mark.parametrize(
    "body",
    [
        lambda y: y + y.sum(0, keepdim=True),
        lambda y: y - y.mean(),
        lambda y: y.cumsum(0),
        lambda y: y.softmax(0),
        lambda y: y.flip(0),
        lambda y: y.roll(1, 0),
        lambda y: y @ y.t() @ y,
        lambda y: y / y.norm(2),
        lambda y: y / torch.norm(y),
        lambda y: y - y.max(),
        lambda y: y - y.amax(dim=()),
        lambda y: y.flip(1, 0),
        lambda y: y.roll((1, 1), (1, 0)),
        lambda y: y + y.unsqueeze(1).transpose(dim0=0, dim1=1).sum(1),
        lambda y: y + y.unsqueeze(1).swapaxes(axis0=0, axis1=1).sum(1),
        lambda y: y + torch.stack([y], dim=-3).sum(1),
        lambda y: y + y[..., 0, :],
        lambda y: y + y.sum(1)[..., :1],
        lambda y: y + y.unsqueeze(1).permute(1, 0, 2).sum(1),
        lambda y: functional.layer_norm(y, (TOKENS * TOP_K, HIDDEN)),
        lambda y: functional.rms_norm(y, (TOKENS * TOP_K, HIDDEN)),
        lambda y: functional.linear(y.sum(1), torch.ones(HIDDEN, TOKENS * TOP_K)) + y,
        lambda y: y.std() * y,
        lambda y: GMM(y, torch.ones(EXPERTS, HIDDEN, HIDDEN), offs=torch.tensor([1, 5, 9, 15], dtype=torch.int32)),
        lambda y: relu(y),
    ],
    ids=[
        "sum", "mean of all", "cumsum", "softmax", "flip", "roll", "attention", "norm of all", "norm without dim", "max of all",
        "amax of all", "flip of both", "roll of both", "transpose by names", "swapaxes by names", "stack in front",
        "ellipsis of nothing", "rows cut off", "permute", "layer norm of all", "rms norm of all", "linear over rows", "std",
        "groups of its own", "a function of the user's",
    ],
)  # fmt: skip
def test_a_body_that_mixes_rows(stock: str, body: Step) -> None:
    assert variant("static", stock, body=body) == "BODY_MIXES_ROWS"  # static: nothing but the matcher can notice


@torch._dynamo.allow_in_graph
def relu(y: Tensor) -> Tensor:
    """Shares its name with an operation that works row by row."""
    return y - y.mean(0)


@pytest.mark.parametrize("body", [lambda y: y + y.sum(0), lambda y: y + y.sum(1)], ids=["over rows", "turned to columns"])
@pytest.mark.parametrize("form", ["compact", "static"])
def test_a_body_that_mixes_rows_where_rows_are_as_many_as_columns(stock: str, form: str, body: Step) -> None:
    function = functools.partial(STOCK[stock], body=body)
    assert refused(function, *inputs(hidden=TOKENS * TOP_K), dispatch=form) == "BODY_MIXES_ROWS"


@pytest.mark.parametrize(
    "body",
    [
        lambda y: y / y.norm(2, 1, keepdim=True),
        lambda y: y / y.norm(dim=-1, keepdim=True),
        lambda y: y.view(-1, 2, HIDDEN // 2).transpose(dim0=1, dim1=2).flatten(1),
        lambda y: y + y.view(-1, HIDDEN, 1)[..., 0, None].squeeze(-1),
        lambda y: y.flip(1).roll(1, dims=1),
        lambda y: functional.layer_norm(y, (HIDDEN,)) + functional.rms_norm(y, (HIDDEN,)),
        lambda y: torch.cat([part.clamp(max=1.0) for part in y.chunk(2, dim=-1)], dim=1),
        lambda y: torch.stack([y, 2 * y], dim=-2).sum(1),
        lambda y: torch.max(y, -y) - y.amax(1, keepdim=True),
    ],
)
def test_a_body_that_works_row_by_row_is_rewritten(stock: str, body: Step) -> None:
    found = harness.capture(functools.partial(STOCK[stock], body=body), *inputs(), dispatch="static")
    assert [(record.status, record.detail) for record in found.records] == [("rewritten", "")]


@pytest.mark.parametrize(
    ("stock", "leak", "code"),
    [
        ("grouped_mm", "y", "BODY_MIXES_ROWS"),
        *(("grouped_mm", leak, "NOT_A_DISPATCH") for leak in ("weighted", "restored", "perm", "pair_token", "sorted_ids")),
        *(("batched_mm", leak, "BODY_MIXES_ROWS") for leak in ("y", "x")),
        *(("batched_mm", leak, "NOT_A_DISPATCH") for leak in ("weighted", "flat_ids")),
    ],
)
def test_values_of_all_pairs_that_are_used_outside_the_dispatch(stock: str, leak: str, code: str) -> None:
    assert variant(stock=stock, leak=leak) == code


@pytest.mark.parametrize(
    "repeat",
    [
        lambda hidden: hidden.repeat(TOP_K, 1),
        lambda hidden: hidden.repeat_interleave(TOP_K, dim=0).flip(0),
        lambda hidden: hidden.t().repeat_interleave(TOP_K, dim=1).t(),
    ],
    ids=["ranks first", "reversed", "columns"],
)
def test_rows_that_are_not_each_token_k_times(repeat: Step) -> None:
    assert variant(stock="batched_mm", repeat=repeat) == "NOT_A_DISPATCH"


def test_matrices_by_other_ids_than_the_first() -> None:
    function = functools.partial(batched, second=lambda ids: (ids + 1) % EXPERTS)
    found = harness.capture(function, *inputs())
    assert not any(record.status == "rewritten" for record in found.records)
    assert [record.code for record in found.records] == ["BODY_MIXES_ROWS", "NOT_A_DISPATCH"]  # one for each ids


def test_a_product_of_gathered_matrices_that_is_no_dispatch() -> None:
    code = refused(lambda w, ids, x: torch.bmm(w[ids], x), torch.randn(4, 5, 6), torch.tensor([1, 3]), torch.randn(2, 6, 1))
    assert code == "NOT_A_DISPATCH"


@pytest.mark.parametrize("leak", ["offsets", "histogram"])
def test_expert_loads_that_are_used_outside_the_dispatch(leak: str) -> None:
    assert variant(leak=leak) == "NOT_A_DISPATCH"


def test_offsets_that_take_part_in_the_output() -> None:
    assert variant(use_offsets=True) == "NOT_A_DISPATCH"


def test_rows_that_are_put_back_in_another_order() -> None:
    assert variant(order=lambda numbers: numbers.flip(0)) == "NOT_A_DISPATCH"


@pytest.mark.parametrize("counted", ["hidden", "unsorted"])
def test_a_histogram_of_something_else(counted: str) -> None:
    assert variant(counted=counted) == "NOT_A_DISPATCH"


@pytest.mark.parametrize(
    "changes",
    [
        {"total": lambda pairs: pairs.view(TOKENS, TOP_K, HIDDEN).mean(dim=1)},
        {"total": lambda pairs: pairs.view(TOKENS, TOP_K, HIDDEN).amax(dim=1)},
        {"total": lambda pairs: pairs.view(TOP_K, TOKENS, HIDDEN).sum(dim=0)},
        {"total": lambda pairs: pairs.view(TOKENS, TOP_K, HIDDEN).sum(dim=2)},
        {"total": lambda pairs: pairs.view(TOKENS, TOP_K, HIDDEN).sum()},
    ],
    ids=["mean", "max", "ranks first", "over features", "over all"],
)
def test_pairs_that_are_not_summed_token_by_token(stock: str, changes: dict[str, Any]) -> None:
    assert variant(stock=stock, **changes) == "NOT_A_DISPATCH"


@pytest.mark.parametrize(("stock", "code"), [("grouped_mm", "NOT_A_DISPATCH"), ("batched_mm", "WEIGHTS_HAVE_OTHER_USERS")])
def test_pairs_that_are_summed_after_another_step(stock: str, code: str) -> None:
    assert variant(stock=stock, pairs=torch.abs) == code


@pytest.mark.parametrize(("stock", "code"), [("grouped_mm", "BODY_HAS_FIXED_ROWS"), ("batched_mm", "NOT_A_DISPATCH")])
def test_compact_refuses_a_body_that_names_the_number_of_pairs(stock: str, code: str) -> None:
    assert variant(stock=stock, body=lambda y: y.view(TOKENS * TOP_K, 2, HIDDEN // 2).flatten(1)) == code


def test_a_body_that_adds_a_table_by_position(stock: str) -> None:
    assert variant(stock=stock, body=lambda y: y + torch.arange(float(TOKENS * TOP_K)).unsqueeze(1)) == "BODY_MIXES_ROWS"


def test_output_of_another_width_than_the_input(stock: str) -> None:
    x, ids, scores, w1, w2 = inputs()

    def narrow(x: Tensor, ids: Tensor, scores: Tensor, w1: Tensor, w2: Tensor) -> Any:
        wide = functools.partial(STOCK[stock], total=lambda pairs: pairs.view(TOKENS, TOP_K, 8).sum(dim=1))
        return wide(x, ids, scores, w1, w2)

    assert refused(narrow, x, ids, scores, w1, w2[:, :, :8]) == "OUTPUT_WIDTH"


def test_experts_whose_weights_are_no_inputs(stock: str) -> None:
    rest = inputs()[:3]

    def made_inside(x: Tensor, ids: Tensor, scores: Tensor) -> Any:
        return STOCK[stock](x, ids, scores, torch.ones(EXPERTS, HIDDEN, 8), torch.ones(EXPERTS, 8, HIDDEN))

    assert refused(made_inside, *rest) == "NO_EXPERT_WEIGHTS"


def test_a_number_of_tokens_that_depends_on_data_is_no_obstacle(stock: str) -> None:
    def picked(x: Tensor, ids: Tensor, scores: Tensor, w1: Tensor, w2: Tensor) -> Any:
        rows = (x[:, 0] > 0).nonzero().squeeze(1)
        return STOCK[stock](x[rows], ids[rows], scores[rows], w1, w2)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert [record.status for record in harness.capture(picked, *inputs()).records] == ["rewritten"]


def test_matrices_picked_from_a_tuple_are_no_anchor() -> None:
    graph = fx.Graph()
    ids, w = graph.placeholder("ids"), graph.placeholder("w")
    picked = graph.call_function(operator.getitem, ((w, w), ids))
    graph.call_function(torch.bmm, (picked, w))
    assert list(batched_mm.find(graph)) == []


def test_weights_whose_parts_share_their_source_name_it_once() -> None:
    graph = fx.Graph()
    weight = source = graph.placeholder("w")
    source.meta["example_value"] = torch.ones(EXPERTS, 2, 2)
    for _ in range(10):  # 2 ** 10 ways from the weight to its source
        weight = graph.call_function(torch.add, (graph.call_function(torch.neg, (weight,)), weight))
    assert weight_inputs(weight) == ("w",)


@pytest.mark.parametrize("form", ["compact", "static"])
def test_expert_parallel_experts(stock: str, form: str) -> None:
    experts = oracle.experts_of(tiny.make("olmoe"))[0]
    experts.config._experts_implementation = stock
    experts._is_expert_parallel = True
    routing = Routing.random(4, torch.float32)
    code = refused(experts.forward, routing.hidden, routing.ids, routing.weights, dispatch=form)
    assert code == "EXPERT_PARALLEL"


@pytest.mark.parametrize("form", ["compact", "static"])
def test_a_graph_without_a_dispatch_is_left_alone_and_has_no_record(form: str) -> None:
    found = harness.capture(lambda x: torch.relu(x) + 1, torch.randn(3, 4), dispatch=form)
    assert found.records == ()
    assert harness.text(found.module) == found.before


@pytest.mark.parametrize("form", ["compact", "static"])
def test_a_refused_site_leaves_another_of_the_same_graph_rewritten(stock: str, form: str) -> None:
    def two(x: Tensor, ids: Tensor, scores: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, w4: Tensor) -> Tensor:
        bad = dispatch(x, ids, scores, w1, w2, weight=torch.square)
        return STOCK[stock](bad, ids, scores, w3, w4)

    x, ids, scores, w1, w2 = inputs()
    args = (x, ids, scores, w1, w2, w1 + 1, w2 - 1)
    found = harness.capture(two, *args, dispatch=form)
    assert sorted((record.status, record.code) for record in found.records) == [
        ("rejected", "WEIGHTS_HAVE_OTHER_USERS"),
        ("rewritten", ""),
    ]
    runtime = harness.FixedRuntime(bounds=torch.tensor([float("inf")] * 3))
    with torch.no_grad():
        out = harness.compiled_block(two, form, runtime)(*args)
    assert not out.any()
