"""The tasks that stand for the paper's benchmarks, and tiny models of the other kinds that it is about."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from published.figures import BENCHMARKS, Benchmark

import modes_fx
from modes_fx import SkipPlan
from tests import checkpoints, harness
from tests.lmms.conftest import answers


@pytest.fixture(scope="module")
def registry(lmms_eval: Any) -> Any:
    """All tasks that lmms-eval brings."""
    from lmms_eval.tasks import TaskManager

    return TaskManager(verbosity="ERROR")


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_every_benchmark_is_a_task_with_its_metrics(benchmark: Benchmark, registry: Any) -> None:
    from lmms_eval.utils import load_yaml_config

    def config(task: str) -> dict[str, Any]:
        found: dict[str, Any] = load_yaml_config(registry.task_index[task]["yaml_path"], mode="simple")
        return found

    assert benchmark.task in registry.all_tasks
    tasks = config(benchmark.task)["task"] if benchmark.task in registry.all_groups else [benchmark.task]
    for task in tasks:
        assert set(benchmark.metrics) <= {metric["metric"] for metric in config(task)["metric_list"]}
        assert config(task).get("output_type", "generate_until") == "generate_until"


@pytest.fixture(scope="module", params=checkpoints.BUILDERS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        harness.compile_with(patch, harness.uncompiled)
        yield checkpoints.save(request.param, tmp_path_factory.mktemp("checkpoint"))


def test_tiny_models_of_other_kinds_are_evaluated(checkpoint: Path, evaluate: Callable[..., dict[str, Any]], wrap: Any) -> None:
    # Untrained logits lie close: in bfloat16 rounding, another on each processor, would choose among them.
    lm = wrap(str(checkpoint), batch_size=3, max_new_tokens=4, device="cpu", dtype="float32")
    kept = evaluate(lm, limit=3, gen_kwargs="max_new_tokens=4")
    stock_args = f"pretrained={checkpoint},optimize=False,dtype=float32"
    stock = evaluate("modes_fx", model_args=stock_args, batch_size=3, limit=3, gen_kwargs="max_new_tokens=4")
    assert answers(kept) == answers(stock)
    assert all(answers(kept))
    modes_fx.set_plan(lm.model, SkipPlan.uniform(text=0.0, vision=float("inf")))
    skipped = evaluate(lm, limit=3, gen_kwargs="max_new_tokens=4")
    assert skipped["throughput"]["avg_skip_ratio_vision"] == 1
    assert skipped["throughput"]["avg_skip_ratio_text"] == 0
    assert answers(skipped) != answers(kept)
