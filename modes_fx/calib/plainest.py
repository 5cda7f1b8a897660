"""Is a plan worth its search? Not where the plainest rule, each token's k largest weights, loses less at its skip ratio."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from modes_fx.calib.objective import Objective, checked
from modes_fx.calib.refine import TOLERANCE
from modes_fx.data.batch import Batch
from modes_fx.optimize import optimize, report, restore
from modes_fx.plan import PlanPoint, SkipPlan


@dataclass(frozen=True)
class Worse:
    """A point of a plan that loses more than Reduce-k does.

    Attributes:
        target: The point's.
        kl: Its KL divergence on data that it was not chosen on, in nats.
        ratio: Its skip ratio there.
        k: Weights that Reduce-k keeps of each token; it skips as much, or half a point less.
        kl_of_k: The KL divergence of that.
    """

    target: float
    kl: float
    ratio: float
    k: int
    kl_of_k: float


def worse_than_reduce_k(model: nn.Module, plan: SkipPlan, held_out: Iterable[Batch]) -> tuple[Worse, ...]:
    """Measure Reduce-k where it skips what the points of a plan skip, and return the points that lose more.

    Args:
        model: The plan's model, not optimised; nor is it afterwards.
        plan: One with ``held_out`` measurements; see ``search``.
        held_out: The data of these.

    Raises:
        CalibrationError: The data cannot be used.
    """
    batches = checked(held_out)
    optimize(model, SkipPlan.reduce_k(1))
    try:
        top_k = max(site.top_k for site in report(model).rewritten)
        objective = Objective(model, batches)
        losses: dict[int, float] = {}
        return tuple(_worse(plan, top_k, objective, losses))
    finally:
        restore(model)


def _worse(plan: SkipPlan, top_k: int, objective: Objective, losses: dict[int, float]) -> Iterator[Worse]:
    for point in plan.points:
        k = _as_much(point, top_k)
        if point.target is None or not k:
            continue
        if k not in losses:
            losses[k] = objective.evaluate(SkipPlan.reduce_k(k).bounds(objective.num_layers)).kl
        if point.kl["held_out"] > losses[k]:
            yield Worse(point.target, point.kl["held_out"], point.realised["held_out"], k, losses[k])


def _as_much(point: PlanPoint, top_k: int) -> int:
    """Return the most weights of each token that can be kept while as much is skipped as a point skips, or nearly."""
    return int(top_k * (1 - point.realised["held_out"] + TOLERANCE))
