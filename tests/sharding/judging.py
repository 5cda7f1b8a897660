"""What an eager model in one process says of the same inputs."""

from typing import Any

import torch
from torch import Tensor

from modes_fx.plan import SkipPlan
from tests import harness, oracle, tiny
from tests.sharding import worker

Found = dict[str, Any]


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
