"""Models whose tokens travel or whose processes have tokens of their own, and what is refused."""

import re

import pytest

import modes_fx
from modes_fx.plan import SkipPlan
from tests import tiny
from tests.policies.test_optimized import plan as plan_of_rule
from tests.sharding import worker
from tests.sharding.judging import Found, assert_counts_add_up, assert_same, check_of, judged

pytestmark = pytest.mark.wide  # several processes

GROUP = "sent"


@pytest.mark.parametrize("form", ["compact", "static"])
def test_where_tokens_travel_skipped_pairs_do_not(both: list[Found], form: str) -> None:
    wanted, judge = judged(worker.MIXED)
    answers = check_of(both, "all_to_all")
    for found in answers:
        assert_same(found[form]["logits"], wanted, worker.MIXED)
        assert found["restored"].equal(found["stock"])
    assert_counts_add_up([found[form] for found in answers], judge)
    there = [each[form]["sent"][::2] for each in answers]  # and the results back
    assert [sum(rows) for rows in zip(*there, strict=True)] == judge.kept.sum(dim=(1, 2)).tolist()
    stock = [each["stock sent"][::2] for each in answers]
    assert [sum(rows) for rows in zip(*stock, strict=True)] == [worker.MIXED["input_ids"].numel() * 3] * 2


def test_a_model_whose_tokens_travel_compiles_in_parts(both: list[Found]) -> None:
    wanted, _ = judged(tiny.text_batch(), family="qwen3_moe")
    for found in check_of(both, "in_parts"):
        assert_same(found["logits"], wanted, tiny.text_batch())


def test_fewer_tokens_than_processes_and_no_pair_at_all_travel_too(both: list[Found]) -> None:
    one = {"input_ids": worker.MIXED["input_ids"][:1, -1:]}
    for found in check_of(both, "all_to_all"):
        assert_same(found["one token"], judged(one)[0], one)
        assert_same(found["nothing"], judged(worker.MIXED, SkipPlan.uniform(text=1e9, vision=1e9))[0], worker.MIXED)


@pytest.mark.parametrize("how", ["experts", "fsdp", "optimised first", "sharded first"])
def test_each_process_with_tokens_of_its_own_answers_and_counts_for_them(both: list[Found], how: str) -> None:
    for rank, found in enumerate(check_of(both, "data_parallel")):
        inputs = worker.own_batch(rank)
        wanted, judge = judged(inputs)
        assert_same(found[how]["logits"], wanted, inputs)
        assert_counts_add_up([found[how]], judge)
        if how == "experts":
            assert found[how]["sent"][::2] == judge.kept.sum(dim=(1, 2)).tolist()


@pytest.mark.usefixtures("without_inductor")
def test_tokens_are_protected_where_a_process_sees_all_heads(both: list[Found]) -> None:
    model = modes_fx.optimize(tiny.make(), plan_of_rule("mc_moe", 0.5))
    for rank, found in enumerate(both):
        alone = worker.answer(model, worker.own_batch(rank))
        assert_same(found["data_parallel"]["mc_moe"]["logits"], alone["logits"], worker.own_batch(rank))
        assert found["data_parallel"]["mc_moe"]["kept"].equal(alone["kept"])
        modes_fx.stats(model).reset()


REFUSALS = {
    "implementation": r"NoRoutingSiteError: .*2 x EXPERT_PARALLEL.*tokens reach the experts by Elsewhere: .*all_to_all",
    "importance": r"CalibrationError: .*sharded over 2 processes.*device_map=\"auto\"",
    "objective": r"CalibrationError: .*sharded over 2 processes.*device_map=\"auto\"",
    "mc_moe": r"ModelError: A rule that protects tokens observes all attention heads.*naee",
    "prepack": r"ModelError: prepack=True found no weight to pack",
    "bare backend": r"^rejected EXPERT_PARALLEL: .*use modes_fx.optimize\(\)[^,]*, with transformers from 5.21 on$",
    "pipeline": r"ModelError: This process runs one stage of a pipeline.*ep_size",
    "fsdp": r"ModelError: FullyShardedDataParallel has flattened.*fully_shard",
    "inside fsdp": r"ModelError: FullyShardedDataParallel has flattened.*fully_shard",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_is_not_taken_is_refused_with_advice_in_both_processes(both: list[Found], what: str) -> None:
    for found in check_of(both, "refusals"):
        assert re.search(REFUSALS[what], found[what], re.S), found[what]
        assert found["stock runs on"].isfinite().all()


def test_layers_that_travel_cannot_be_wider_regions(both: list[Found]) -> None:
    for found in check_of(both, "all_to_all"):
        assert found["region"].startswith("ModelError: Tokens travel to their experts by all-to-all")
        assert found["region"].endswith('Use region="moe".')
