"""Models that two processes share, against an eager model in one; each process runs ``worker``."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import modes_fx
from modes_fx.plan import SkipPlan
from tests import harness, oracle, tiny
from tests.policies.test_optimized import oracles_answer
from tests.policies.test_optimized import plan as plan_of_rule
from tests.sharding import worker

Found = dict[str, Any]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each of the two processes found, by check."""
    folder = tmp_path_factory.mktemp("both")
    tiny.make("qwen3_moe").save_pretrained(folder / "qwen3_moe")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.sharding.worker"]
    options: dict[str, Any] = {"cwd": Path(__file__).parents[2], "env": environment, "text": True, "stderr": subprocess.PIPE}
    started = [subprocess.Popen([*command, str(rank), str(folder)], **options) for rank in range(2)]
    try:
        ended = [process.communicate(timeout=900)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(ended)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def judged(inputs: dict[str, Tensor], plan: SkipPlan | None = worker.PLAN, family: str = "qwen3_vl_moe") -> tuple[Tensor, Any]:
    """The answer of a stock model with pairs silenced, and the oracle that did it."""
    judge = oracle.Oracle(tiny.make(family), None if plan is None else plan.bounds(2), torch.float32)
    return judge(tiny.classes(inputs), **inputs, use_cache=False).logits, judge


def assert_same(actual: Tensor, wanted: Tensor, inputs: dict[str, Tensor]) -> None:
    assert harness.relative_error(actual, wanted, tiny.classes(inputs) != 2) <= 1e-5


def assert_counts_add_up(answers: list[Found], judge: oracle.Oracle) -> None:
    assert sum(each["routed"] for each in answers).equal(judge.routed)
    assert sum(each["kept"] for each in answers).equal(judge.kept)


def check_of(both: list[Found], name: str) -> list[Found]:
    return [found[name] for found in both]


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
def test_tokens_are_protected_where_a_process_sees_all_heads_and_else_the_rule_is_refused(both: list[Found]) -> None:
    model = modes_fx.optimize(tiny.make(), plan_of_rule("mc_moe", 0.5))
    for rank, found in enumerate(both):
        alone = worker.answer(model, worker.own_batch(rank))
        assert_same(found["data_parallel"]["mc_moe"]["logits"], alone["logits"], worker.own_batch(rank))
        assert found["data_parallel"]["mc_moe"]["kept"].equal(alone["kept"])
        modes_fx.stats(model).reset()
        assert found["rules"]["mc_moe"].startswith("ModelError: A rule that protects tokens observes all attention heads")
        assert "naee" in found["rules"]["mc_moe"]


REFUSALS = {
    "implementation": r"NoRoutingSiteError: .*2 x EXPERT_PARALLEL.*tokens reach the experts by Elsewhere: .*all_to_all",
    "importance": r"CalibrationError: .*sharded over 2 processes.*device_map=\"auto\"",
    "objective": r"CalibrationError: .*sharded over 2 processes.*device_map=\"auto\"",
    "prepack": r"ModelError: prepack=True found no weight to pack",
    "bare backend": r"^rejected EXPERT_PARALLEL: .*use modes_fx.optimize\(\)[^,]*, with transformers from 5.21 on$",
    "pipeline": r"ModelError: This process runs one stage of a pipeline.*ep_size",
    "fsdp": r"ModelError: FullyShardedDataParallel has flattened.*fully_shard",
    "inside fsdp": r"ModelError: FullyShardedDataParallel has flattened.*fully_shard",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_is_not_taken_is_refused_with_advice_in_both_processes(both: list[Found], what: str) -> None:
    import re

    for found in check_of(both, "refusals"):
        assert re.search(REFUSALS[what], found[what], re.S), found[what]
        assert found["stock runs on"].isfinite().all()


def test_layers_that_travel_cannot_be_wider_regions(both: list[Found]) -> None:
    for found in check_of(both, "all_to_all"):
        assert found["region"].startswith("ModelError: Tokens travel to their experts by all-to-all")
        assert found["region"].endswith('Use region="moe".')
