"""What the rewritten dispatch computes, in each form: it equals a loop over kept pairs, and dropped pairs cost no row."""

import math

import pytest
import torch
from torch import Tensor

from tests import harness, oracle, tiny
from tests.passes.conftest import STOCK, TOP_K, Form, Routing, assert_close, expected

NO_BOUNDS = torch.tensor([0.0, 0.0, math.inf])
ALL_SKIPPED = torch.tensor([math.inf] * 3)


def kept_pairs(routing: Routing, bounds: Tensor, classes: Tensor) -> Tensor:
    return oracle.at_least(routing.weights, bounds[classes])


@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
def test_bounds_of_zero_change_nothing(form: Form, tokens: int) -> None:
    routing = Routing.random(tokens, form.dtype, seed=tokens)
    exact = expected(form.experts, routing, torch.ones(tokens, TOP_K, dtype=torch.bool))
    ours, stock = form(routing, NO_BOUNDS).double(), form.stock(routing).double()
    assert_close(ours, exact, form.dtype)
    # Both round to the same dtype at the end; the sum in between is taken in float32 by either, in another order.
    slack = 1e-6 if form.dtype is torch.float32 else 0.0
    assert (ours - exact).abs().mean() <= 1.05 * (stock - exact).abs().mean() + slack


@pytest.mark.parametrize("seed", range(6))
def test_dropped_pairs_are_missing_from_the_sum_and_no_other(form: Form, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = int(torch.randint(2, 30, (), generator=generator))
    routing = Routing.random(tokens, form.dtype, seed=seed)
    classes = torch.randint(0, 3, (tokens,), generator=generator)
    bounds = torch.cat([torch.rand(2, generator=generator) * 0.5, torch.tensor([math.inf])])
    keep = kept_pairs(routing, bounds, classes)
    assert 0 < int(keep.sum()) < keep.numel()
    assert_close(form(routing, bounds, classes), expected(form.experts, routing, keep), form.dtype)


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_call_in_which_everything_is_skipped_is_exactly_zero_and_computes_no_row(form: Form, tokens: int) -> None:
    assert not form(Routing.random(tokens, form.dtype), ALL_SKIPPED).any()
    assert form.kept == []
    if form.skips_rows:
        assert form.log.computed == [0, 0]
    if form.dispatch != "static":
        assert form.log.rows == [0, 0]


def test_a_token_may_lose_all_its_experts_while_others_keep_theirs(form: Form) -> None:
    routing = Routing.random(4, form.dtype)
    classes = torch.tensor([2, 0, 2, 0])
    out = form(routing, NO_BOUNDS, classes)
    assert not out[[0, 2]].any()
    assert out[[1, 3]].any(dim=1).all()


def test_a_weight_equal_to_the_bound_is_kept(form: Form) -> None:
    routing = Routing.random(3, form.dtype)
    routing.weights[:] = torch.tensor([0.5, 0.25, 0.125])
    form(routing, torch.tensor([0.25, 0.25, math.inf]))
    assert len(form.kept) == 6
    form(routing, torch.tensor([0.25 + 2**-20, 1.0, math.inf]))  # would round to 0.25 in bfloat16: compared in float32
    assert len(form.kept) == 3


def test_rows_that_reach_the_gemm_are_the_pairs_kept(form: Form) -> None:
    routing = Routing.random(20, form.dtype, seed=3)
    classes = torch.arange(20) % 3
    bounds = torch.tensor([0.2, 0.35, math.inf])
    keep = kept_pairs(routing, bounds, classes)
    form(routing, bounds, classes)
    kept, pairs = int(keep.sum()), keep.numel()
    reaching = keep if form.skips_rows else torch.ones_like(keep)  # else a dropped pair is a row that is selected away
    assert form.log.computed == [int(reaching.sum())] * 2
    assert form.log.rows == [pairs if form.dispatch == "static" else kept] * 2
    rows = form.log.inputs[0][: int(reaching.sum())]
    assert sorted(routing.hidden.eq(row).all(dim=1).nonzero().item() for row in rows) == reaching.nonzero()[:, 0].tolist()


def test_experts_that_no_pair_keeps_are_not_read(form: Form) -> None:
    routing = Routing.random(3, form.dtype, seed=3)
    bounds = torch.tensor([0.25, 0.25, math.inf])
    keep = kept_pairs(routing, bounds, torch.zeros(3, dtype=torch.int64))
    keepers, wanted = keep.any(dim=1), set(routing.ids[keep].tolist())
    assert keepers.all()
    assert wanted < set(routing.ids.flatten().tolist())
    form(routing, bounds)
    assert form.log.experts == [wanted, wanted]


def test_a_token_that_keeps_nothing_reads_one_expert_at_most(form: Form) -> None:
    routing = Routing.random(2, form.dtype, seed=3)
    form(routing, ALL_SKIPPED)
    assert form.log.experts == [set() if form.skips_rows else set(routing.ids[:, 0].tolist())] * 2


def test_the_mask_handed_out_holds_the_pairs_kept(form: Form) -> None:
    routing = Routing.random(20, form.dtype, seed=4)
    keep = kept_pairs(routing, torch.tensor([0.25, 0.25, math.inf]), torch.zeros(20, dtype=torch.int64))
    form(routing, torch.tensor([0.25, 0.25, math.inf]))
    assert form.kept == keep.flatten().nonzero()[:, 0].tolist()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_poisoned_expert_that_every_token_skips_leaves_no_trace(form: Form, poison: float) -> None:
    routing = Routing.random(12, form.dtype, seed=5)
    victim = 2
    routing.weights[:] = torch.where(routing.ids == victim, 0.1, 0.5)
    assert (routing.ids == victim).any()
    saved = {name: parameter.detach().clone() for name, parameter in form.experts.named_parameters()}
    wanted = expected(form.experts, routing, routing.ids != victim)
    with torch.no_grad():
        for parameter in form.experts.parameters():
            parameter[victim] = poison
        assert not torch.isfinite(form.stock(routing)).all()
        out = form(routing, torch.tensor([0.3, 0.3, math.inf]))
        for name, parameter in form.experts.named_parameters():
            parameter.copy_(saved[name])
    assert_close(out, wanted, form.dtype)


def test_one_trace_serves_any_number_of_tokens_and_of_kept_pairs(form: Form) -> None:
    form(Routing.random(9, form.dtype), NO_BOUNDS)
    traced = form.traced
    for tokens in (2, 3, 16, 33):
        for bound in (0.0, 0.3, math.inf):
            form(Routing.random(tokens, form.dtype), torch.tensor([bound, bound, math.inf]))
    assert form.traced == traced


@pytest.mark.parametrize("dispatch", ["compact", "static"])
@pytest.mark.parametrize("stock_form", STOCK)
def test_bare_experts_whose_every_size_varies_are_traced_for_their_k(stock_form: str, dispatch: str) -> None:
    runtime = harness.FixedRuntime()
    experts = oracle.experts_of(tiny.make("olmoe"))[0]
    experts.config._experts_implementation = stock_form
    run = harness.compiled_block(experts, dispatch, runtime, dynamic=True)
    runtime.bounds = torch.full((3,), 0.25)
    for tokens, top_k in ((5, TOP_K), (9, TOP_K), (4, TOP_K - 1), (7, TOP_K - 1)):
        routing = Routing.random(tokens, torch.float32, seed=tokens)
        routing = Routing(routing.hidden, routing.ids[:, :top_k], routing.weights[:, :top_k])
        with torch.no_grad():
            out = run(routing.hidden, routing.ids, routing.weights)
        keep = oracle.at_least(routing.weights, torch.full((tokens,), 0.25))
        assert_close(out, expected(experts, routing, keep), torch.float32)
    ks = [[(record.status, record.top_k) for record in graph] for graph in runtime.graphs]
    assert ks == [[("rewritten", TOP_K)], [("rewritten", TOP_K - 1)]]


@pytest.mark.parametrize("dispatch", ["compact", "static"])
@pytest.mark.parametrize("stock_form", STOCK)
def test_reduce_k_keeps_the_largest_k(stock_form: str, dispatch: str) -> None:
    runtime = harness.FixedRuntime()
    experts = oracle.experts_of(tiny.make("olmoe"))[0]
    experts.config._experts_implementation = stock_form
    run = harness.compiled_block(experts, dispatch, runtime, rule="reduce_k")
    routing = Routing.random(6, torch.float32)
    for k in range(TOP_K + 1):
        runtime.bounds = torch.tensor([float(k), float(k), 0.0])
        with torch.no_grad():
            out = run(routing.hidden, routing.ids, routing.weights)
        keep = oracle.largest(routing.weights, torch.full((6,), float(k)))
        assert_close(out, expected(experts, routing, keep), torch.float32)
    assert len(runtime.graphs) == 1
