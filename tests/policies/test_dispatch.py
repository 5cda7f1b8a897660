"""Rules with inputs or weights of their own in each form of the dispatch: what is kept is computed, and nothing else."""

import itertools

import pytest
import torch

from modes_fx.graph.backend import inductor
from modes_fx.policies import RULES
from tests import harness, oracle, tiny
from tests.passes.conftest import DISPATCHES, EXPERTS, TOP_K, Routing, assert_close, expected
from tests.policies.tables import bound_for, table_for
from tests.wide import beyond

NAMES = ("naee", "naee_top2", "diep", "random", "batch_threshold", "top_p", "entropy_k", "oea")
KEEPS_RANK_1 = ("naee_top2", "top_p", "entropy_k")
CASES = [(*both, rule) for both, rule in itertools.product(DISPATCHES, NAMES)]


@pytest.mark.parametrize(("stock_form", "dispatch", "rule"), CASES)
def test_what_a_rule_keeps_is_computed_with_its_weights_and_nothing_else(stock_form: str, dispatch: str, rule: str) -> None:
    runtime = harness.FixedRuntime()
    runtime.table = table_for(rule, EXPERTS)
    log = harness.GemmLog()
    experts = oracle.experts_of(tiny.make("olmoe"))[0]
    experts.config._experts_implementation = stock_form
    run = harness.compiled_block(experts, dispatch, runtime, log, rule=rule)
    for tokens, share in ((9, 0.0), (9, 0.4), (20, 0.7), (7, 1e9)):
        beta = bound_for(rule, share)
        routing = Routing.random(tokens, torch.float32, seed=tokens)
        for tensor in (routing.hidden, routing.ids, routing.weights):
            torch._dynamo.mark_dynamic(tensor, 0)
        runtime.bounds = torch.tensor([beta, beta, RULES[rule].skip_all])
        runtime.recorded.clear()
        log.clear()
        with torch.no_grad():
            out = run(routing.hidden, routing.ids, routing.weights)
        survivors = oracle.decide(rule, routing.weights, routing.ids, torch.full((tokens,), beta), table_for(rule, EXPERTS))
        keep = ~survivors.isnan()
        kept, fewest = int(keep.sum()), tokens if rule in KEEPS_RANK_1 else 0
        if share in (0.0, 1e9):
            assert kept == (fewest if share else keep.numel())
        else:
            assert fewest < kept < keep.numel()
        changed = Routing(routing.hidden, routing.ids, survivors.nan_to_num())
        assert_close(out, expected(experts, changed, keep), torch.float32)
        pairs = runtime.recorded[0]
        assert sorted(pairs.tolist()) == keep.flatten().nonzero().flatten().tolist()
        if (stock_form, dispatch) != ("batched_mm", "static"):
            assert log.computed == [kept] * 2
    assert len(runtime.graphs) == 1
    assert TOP_K == 3


@pytest.mark.parametrize("dispatch", ["compact", "static"])
def test_renormalised_weights_are_rounded_to_the_models_dtype_and_unchanged_where_all_is_kept(dispatch: str) -> None:
    runtime = harness.FixedRuntime()
    experts = oracle.experts_of(tiny.make("olmoe", torch.bfloat16))[0]
    experts.config._experts_implementation = "grouped_mm"
    outs = {}
    for rule in ("naee_top2", "threshold"):
        run = harness.compiled_block(experts, dispatch, runtime, rule=rule)
        routing = Routing.random(12, torch.bfloat16)
        runtime.bounds = torch.tensor([0.0, 0.0, float("inf")])
        with torch.no_grad():
            outs[rule] = run(routing.hidden, routing.ids, routing.weights)
    assert outs["naee_top2"].dtype == torch.bfloat16
    assert outs["naee_top2"].equal(outs["threshold"])


@pytest.mark.parametrize("rule", beyond({"top_p"}, ["diep", "random", "batch_threshold", "top_p", "entropy_k", "oea"], str))
def test_generated_code_decides_alike(rule: str) -> None:
    runtime = harness.FixedRuntime()
    runtime.table = table_for(rule, EXPERTS)
    experts = oracle.experts_of(tiny.make("olmoe"))[0]
    experts.config._experts_implementation = "grouped_mm"
    run = harness.compiled_block(experts, "compact", runtime, inductor, rule=rule)  # integers wrap and sums round as in eager
    routing = Routing.random(60, torch.float32)
    bound = bound_for(rule, 0.4)
    runtime.bounds = torch.tensor([bound, bound, RULES[rule].skip_all])
    with torch.no_grad():
        run(routing.hidden, routing.ids, routing.weights)
    survivors = oracle.decide(rule, routing.weights, routing.ids, torch.full((60,), bound), table_for(rule, EXPERTS))
    assert sorted(runtime.recorded[0].tolist()) == (~survivors.isnan()).flatten().nonzero().flatten().tolist()
