"""What lmms-eval needs is imported inside fixtures: importing it changes loggers, and these tests alone depend on it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import modes_fx
from modes_fx import demo
from modes_fx.lmms import TASKS
from tests import harness


@pytest.fixture(scope="session")
def lmms_eval() -> Any:
    """lmms-eval's evaluator; the tests that use it are skipped where it is not installed."""
    return pytest.importorskip("lmms_eval.evaluator")


@pytest.fixture(scope="module")
def optimized() -> Iterator[tuple[Any, Any]]:
    """The embedded model, optimised once for the tests of a file, its graphs run without Inductor; and its processor."""
    with pytest.MonkeyPatch.context() as patch:
        harness.compile_with(patch, harness.uncompiled)
        model, processor = demo.load()
        modes_fx.optimize(model)
        inputs = demo.collate(demo.make_samples("test", 1)[:2], processor, answers=False)
        model.generate(**inputs, max_new_tokens=2)  # its graphs are made while Inductor is kept out
        yield model, processor
    modes_fx.restore(model)


@pytest.fixture
def wrap(lmms_eval: Any) -> Callable[..., Any]:
    """Make the wrapper."""
    from modes_fx.lmms.model import ModesFx

    return ModesFx


@pytest.fixture
def evaluate(lmms_eval: Any) -> Callable[..., dict[str, Any]]:
    """Run ``modes_fx_demo`` through lmms-eval's own evaluator."""
    from lmms_eval.tasks import TaskManager

    def run(model: Any, limit: int = 6, **settings: Any) -> dict[str, Any]:
        manager = TaskManager(include_path=str(TASKS), include_defaults=False)
        results: dict[str, Any] = lmms_eval.simple_evaluate(
            model, tasks=["modes_fx_demo"], task_manager=manager, limit=limit, **settings
        )
        return results

    return run


def answers(results: dict[str, Any]) -> list[str]:
    """What the model answered, question by question."""
    samples = sorted(results["samples"]["modes_fx_demo"], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"][0] for sample in samples]
