"""Threads that share a model or a process, and what a model leaves behind."""

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modes_fx
from modes_fx.attach import regions
from modes_fx.plan import SkipPlan
from tests import tiny
from tests.harness import logits

pytestmark = pytest.mark.usefixtures("without_inductor")

PLAN = SkipPlan.uniform(text=0.25, vision=0.4)
OTHER = SkipPlan.uniform(text=0.5, vision=0.1)
ALL = SkipPlan.uniform(text=float("inf"), vision=float("inf"))
INPUTS = tiny.mixed_batch(seed=5)
REAL = tiny.classes(INPUTS) != 2


def together(*tasks: Callable[[], None]) -> None:
    """Run tasks in threads of their own; what one raises is raised."""
    errors: list[BaseException] = []

    def run(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("region", ["moe", "model"])
def test_each_forward_in_a_thread_sees_one_of_two_plans_as_a_whole(vlm: nn.Module, region: Any) -> None:
    modes_fx.optimize(vlm, PLAN, region=region)
    answers = []
    for plan in (OTHER, PLAN):
        modes_fx.set_plan(vlm, plan)
        answers.append(logits(vlm, INPUTS))
    assert (answers[0] - answers[1])[REAL].abs().max() > 1e-2
    seen = [0, 0]
    left = threading.Semaphore(0)
    done = threading.Event()

    def forwards() -> None:
        for _ in range(50):
            actual = logits(vlm, INPUTS)
            found = [answer.equal(actual) for answer in answers]
            assert any(found)
            seen[found.index(True)] += 1
            left.release()

    def plans() -> None:
        turn = 0
        while not done.is_set():
            modes_fx.set_plan(vlm, (OTHER, PLAN)[turn % 2])
            turn += 1
            left.acquire(timeout=0.01)

    switching = threading.Thread(target=plans)
    switching.start()
    try:
        together(*[forwards] * 3)
    finally:
        done.set()
        switching.join()
    assert sum(seen) == 150
    assert min(seen) > 0


def test_two_optimised_models_and_a_stock_one_do_not_mix_in_threads() -> None:
    models = [*(modes_fx.optimize(tiny.make("qwen3_moe"), plan) for plan in (PLAN, ALL)), tiny.make("qwen3_moe")]
    inputs = [tiny.text_batch(seed=seed) for seed in range(3)]
    expected = [logits(model, batch) for model, batch in zip(models, inputs, strict=True)]
    alone = [modes_fx.stats(model) for model in models[:2]]

    def calls(model: nn.Module, batch: dict[str, Tensor], answer: Tensor) -> None:
        for _ in range(20):
            assert logits(model, batch).equal(answer)

    with alone[0], alone[1]:
        together(*[lambda job=job: calls(*job) for job in zip(models, inputs, expected, strict=True)] * 2)
    assert [int(stats.pairs_routed.sum()) for stats in alone] == [2 * 40 * 18 * 3] * 2
    assert alone[1].skip_ratio() == 1


@pytest.mark.parametrize("region", ["moe", "layer"])
def test_a_call_that_dynamo_passes_over_is_answered_and_counted_alike_and_the_next_is_compiled(
    region: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Dynamo leaves such a function alone for good, unless it is told otherwise."""
    model, inputs = modes_fx.optimize(tiny.one_layer(), PLAN, region=region), tiny.text_batch()

    def ask() -> tuple[Tensor, Tensor]:
        with modes_fx.stats(model).reset() as stats:
            return logits(model, inputs), stats.pairs_kept.clone()

    with torch._dynamo.config.patch(disable=True):
        passed_over = ask()
    assert modes_fx.report(model).graphs == 0
    assert f"{'SparseMoeBlock' if region == 'moe' else 'DecoderLayer'} ran uncompiled" in caplog.text
    compiled = ask()
    assert modes_fx.report(model).graphs == 1
    torch.testing.assert_close(passed_over[0], compiled[0])
    assert passed_over[1].equal(compiled[1])
    assert 0 < int(compiled[1].sum()) < 18 * 3


def test_restored_models_leave_nothing_behind() -> None:
    model, inputs = tiny.make("qwen3_moe"), tiny.text_batch()

    def once() -> list[weakref.ref[Any]]:
        modes_fx.optimize(model, PLAN)
        logits(model, inputs)
        state = vars(model)["_modes_fx"]
        made = [type(model), state, state.runtime, *state.watches, state.regions]
        modes_fx.restore(model)
        return [weakref.ref(item) for item in made]

    def left() -> dict[str, int]:
        gc.collect()
        kinds = Counter(type(item).__name__ for item in gc.get_objects())
        return {kind: kinds[kind] for kind in ("GraphModule", "Graph", "Runtime", "Parameter")}

    once()
    before, names = left(), set(vars(regions))
    refs = once() + once()
    assert {kind: number for kind, number in left().items() if number > before[kind]} == {}
    assert [ref() for ref in refs if ref() is not None] == []
    assert set(vars(regions)) == names  # where dynamo puts the functions that it compiled


@pytest.mark.parametrize("region", ["moe", "model"])
def test_an_optimised_model_that_is_deleted_is_gone(region: Any) -> None:
    model = modes_fx.optimize(tiny.make("qwen3_moe"), PLAN, region=region)
    logits(model, tiny.text_batch())
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    assert [ref() for ref in weights if ref() is not None] == []
