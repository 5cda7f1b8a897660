"""Models whose processes hold the same tokens, against an eager model in one process."""

import pytest

import modes_fx
from tests import tiny
from tests.policies.test_optimized import oracles_answer
from tests.policies.test_optimized import plan as plan_of_rule
from tests.sharding import worker
from tests.sharding.judging import Found, assert_counts_add_up, assert_same, check_of, judged

pytestmark = pytest.mark.wide  # several processes

GROUP = "held"


@pytest.mark.parametrize("form", ["compact", "static"])
def test_tensor_parallel_from_pretrained_skips_the_same_pairs_and_each_process_counts_them_all(
    both: list[Found], form: str
) -> None:
    inputs = tiny.text_batch()
    wanted, judge = judged(inputs, family="qwen3_moe")
    for found in check_of(both, "tensor_parallel"):
        assert_same(found[form]["logits"], wanted, inputs)
        assert found[form]["routed"].equal(judge.routed)
        assert found[form]["kept"].equal(judge.kept)
        assert found[form]["sites"] == [("rewritten", "grouped_mm", form, 6)] * 2


@pytest.mark.usefixtures("without_inductor")
def test_generation_gives_the_tokens_of_one_process(both: list[Found]) -> None:
    model, inputs = modes_fx.optimize(tiny.make("qwen3_moe"), worker.PLAN), tiny.text_batch()
    wanted = worker.generated(model, inputs)
    for found in both:
        assert found["tensor_parallel"]["generated"].equal(wanted)
        assert found["experts_from_pretrained"]["generated"].equal(wanted)


def test_expert_parallel_from_pretrained_counts_each_pair_once_over_both_processes(both: list[Found]) -> None:
    inputs = tiny.text_batch()
    wanted, judge = judged(inputs, family="qwen3_moe")
    answers = check_of(both, "experts_from_pretrained")
    for found in answers:
        assert_same(found["logits"], wanted, inputs)
        assert found["sites"] == [("rewritten", "grouped_mm", "compact", 3)] * 2
    assert_counts_add_up(answers, judge)


@pytest.mark.parametrize("how", ["moe, compact", "moe, static", "layer, compact", "model, static"])
def test_experts_of_two_processes_answer_as_those_of_one(both: list[Found], how: str) -> None:
    wanted, judge = judged(worker.MIXED)
    answers = [found[how] for found in check_of(both, "all_reduce")]
    for found in answers:
        assert_same(found["logits"], wanted, worker.MIXED)
        assert found["sites"] == [("rewritten", "grouped_mm", how.partition(", ")[2], 3)] * 2
    assert_counts_add_up(answers, judge)


def test_nothing_skipped_and_restored_are_stock(both: list[Found]) -> None:
    wanted, _ = judged(worker.MIXED, None)
    for found in check_of(both, "all_reduce"):
        assert_same(found["nothing skipped"], wanted, worker.MIXED)
        assert found["restored"].equal(found["stock"])


def test_one_graph_around_the_model_holds_the_collectives_and_the_rewritten_sites(both: list[Found]) -> None:
    inputs = tiny.text_batch()
    wanted, judge = judged(inputs, family="qwen3_moe")
    answers = check_of(both, "one_graph")
    for how in ("as it is", "passed"):
        for found in answers:
            assert_same(found[how]["logits"], wanted, inputs)
        assert_counts_add_up([found[how] for found in answers], judge)
    for found in answers:
        assert found["sites"] == [[("rewritten", "kernels", 0), ("rewritten", "kernels", 1)]]


@pytest.mark.parametrize("form", ["compact", "static"])
def test_pairs_of_others_and_dropped_pairs_reach_no_gemm_and_their_experts_may_hold_nan(both: list[Found], form: str) -> None:
    wanted, judge = judged(worker.FEW, worker.POISONED, "qwen3_moe")
    answers = [found[form] for found in check_of(both, "rows_computed")]
    assert any(expert < 3 for each in worker.victims() for expert in each)
    assert any(expert >= 3 for each in worker.victims() for expert in each)
    for found in answers:
        assert_same(found["logits"], wanted, worker.FEW)
        kept = found["kept"].sum(dim=(1, 2)).repeat_interleave(2).tolist()  # two GEMMs a layer
        assert found["computed"] == kept
        assert found["rows"] == (kept if form == "compact" else [15] * 4)
    assert_counts_add_up(answers, judge)


@pytest.mark.parametrize("rule", worker.RULES)
def test_rules_see_all_pairs_of_a_token_wherever_their_experts_are(both: list[Found], rule: str) -> None:
    wanted, kept = oracles_answer(plan_of_rule(rule, 0.5), worker.MIXED)
    answers = [found[rule] for found in check_of(both, "rules")]
    for found in answers:
        assert_same(found["logits"], wanted, worker.MIXED)
    assert sum(found["kept"] for found in answers)[..., 0].equal(kept)
