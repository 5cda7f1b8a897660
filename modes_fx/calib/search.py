"""Choose the thresholds: for each target skip ratio the pair, and the exponent of alpha, of least loss."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from modes_fx.calib.frontier import FrontierPoint, FrontierResult, frontier_search
from modes_fx.calib.importance import Importance
from modes_fx.calib.objective import Batch, Evaluation, Objective, optimized
from modes_fx.calib.routing import RoutingRecorder
from modes_fx.errors import CalibrationError
from modes_fx.modality import MODALITIES
from modes_fx.plan import PlanPoint, SkipPlan, describe_model

GAMMAS = (0.0, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Trial:
    """One evaluated choice of thresholds."""

    gamma: float
    tau_text: float
    tau_vision: float
    evaluation: Evaluation


def search(
    model: nn.Module,
    batches: Iterable[Batch],
    importance: Importance,
    targets: Sequence[float] = (0.5, 0.75, 0.875),
    *,
    gammas: Sequence[float] = GAMMAS,
    grid_size: int = 24,
    held_out: Iterable[Batch] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> SkipPlan:
    """Find thresholds that reach each target skip ratio at the least KL divergence.

    A frontier search for each gamma over a ``grid_size`` x ``grid_size`` grid of the model's own scores
    ``alpha**gamma * weight``: quantiles, so that each step skips about as much more as the one before. The gamma is chosen on
    ``batches`` too; ``held_out`` is only measured.

    Args:
        model: A model that ``modes_fx.optimize`` takes, optimised or not.
        batches: Calibration data; see ``Objective``.
        importance: From ``layer_importance``.
        targets: Skip ratios in [0, 1]. One that cannot be reached is left out of the plan.
        gammas: Exponents of alpha to try, >= 0; 1 is MoDES as published, 0 leaves alpha out.
        grid_size: Thresholds tried for each modality, >= 2.
        held_out: Other data, on which each chosen point is measured.
        on_trial: Called after each evaluation on ``batches``.

    Raises:
        CalibrationError: No target can be reached, or an argument is out of range.
    """
    if grid_size < 2 or not gammas or not targets:
        raise CalibrationError("search() needs a grid of at least 2 thresholds, one gamma and one target.")
    started, batches = time.monotonic(), list(batches)
    with optimized(model):
        objective = Objective(model, batches)
        if len(importance.alpha) != objective.num_layers:
            raise CalibrationError(
                f"The importance is for {len(importance.alpha)} MoE layers, the model has {objective.num_layers}."
            )
        routing = objective.routing_weights()
        trials: dict[tuple[float, float, float], Trial] = {}
        results: dict[float, FrontierResult] = {}
        for gamma in sorted(gammas, key=lambda gamma: abs(gamma - 0.5)):  # the likeliest first: its losses prune the others
            at_hand = [point.loss if point is not None else math.inf for _, point in _best(results, len(targets))]
            results[gamma] = _search_gamma(objective, routing, importance, gamma, targets, grid_size, at_hand, trials, on_trial)
        chosen = _best(results, len(targets))
        found = [(gamma, point) for gamma, point in chosen if point is not None]
        if not found:
            raise CalibrationError(f"No target of {list(targets)} can be reached on this data.")
        fresh = None if held_out is None else Objective(model, held_out)
        points = tuple(_plan_point(gamma, point, trials, importance, fresh) for gamma, point in found)
    search_facts = {
        "evaluations": len(trials),
        "exhaustive": sum(result.exhaustive for result in results.values()),
        "violations": sum(len(result.violations) for result in results.values()),
        "largest_violation": max((item.size for result in results.values() for item in result.violations), default=0.0),
        "unreachable_targets": [target for target, (_, point) in zip(targets, chosen, strict=True) if point is None],
        "gammas": list(gammas),
        "grid_size": grid_size,
        "seconds": round(time.monotonic() - started, 3),
    }
    provenance = {
        "data_hash": data_hash(batches),
        "answer_tokens": objective.answer_tokens,
        "importance_mode": importance.mode,
        "search": search_facts,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]},
    }
    model_facts = describe_model(getattr(model, "config", None))
    points = tuple(sorted(points, key=lambda point: point.target or 0.0))
    return SkipPlan(points, importance.alpha, objective.layers, model_facts, provenance)


def score_grid(scores: Tensor, size: int) -> list[float]:
    """Return ascending thresholds that skip about equal steps more: 0, inner quantiles, and one above every score.

    Args:
        scores: float32 [n] of ``alpha**gamma * weight``.
        size: Thresholds wanted; fewer come back where scores are equal.
    """
    if not len(scores):
        return [0.0]
    levels = torch.linspace(0, 1, size, dtype=torch.float64)[1:-1]
    inner = torch.quantile(scores.double(), levels).tolist()
    top = float(torch.nextafter(scores.max().float() * (1 + 1e-5), torch.tensor(torch.inf)))
    return sorted({0.0, *inner, top})


def data_hash(batches: Iterable[Batch]) -> str:
    """Return a short hash of all tensors of the batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            if isinstance(batch[key], Tensor):
                digest.update(key.encode())
                digest.update(batch[key].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _search_gamma(
    objective: Objective,
    routing: RoutingRecorder,
    importance: Importance,
    gamma: float,
    targets: Sequence[float],
    grid_size: int,
    at_hand: Sequence[float],
    trials: dict[tuple[float, float, float], Trial],
    on_trial: Callable[[Trial], None] | None,
) -> FrontierResult:
    scores = []
    for index in range(len(MODALITIES)):
        by_layer = zip(importance.alpha, routing.weights(index), strict=True)
        scores.append(torch.cat([alpha[index] ** gamma * weights for alpha, weights in by_layer]).sort().values)
    total = sum(routing.pairs)

    def trial(tau_text: float, tau_vision: float) -> Evaluation:
        key = (gamma, tau_text, tau_vision)
        if key not in trials:
            plan = SkipPlan((PlanPoint(None, tau_text, tau_vision, gamma),), importance.alpha)
            trials[key] = Trial(*key, objective.evaluate(plan.bounds(objective.num_layers)))
            if on_trial is not None:
                on_trial(trials[key])
        return trials[key].evaluation

    def guess(tau_text: float, tau_vision: float) -> float:
        """Predict the skip ratio from the unskipped model's scores."""
        taus = torch.tensor([tau_text, tau_vision])
        below = [float(torch.searchsorted(s, tau)) / max(len(s), 1) for s, tau in zip(scores, taus, strict=True)]
        return sum(share * pairs for share, pairs in zip(below, routing.pairs, strict=True)) / total

    return frontier_search(
        lambda text, vision: trial(text, vision).kl,
        lambda text, vision: trial(text, vision).skip_ratio,
        score_grid(scores[0], grid_size),
        score_grid(scores[1], grid_size),
        targets,
        g_guess=guess,
        better_than=at_hand,
    )


def _best(results: Mapping[float, FrontierResult], num_targets: int) -> list[tuple[float, FrontierPoint | None]]:
    """Return, for each target, the point of least loss over all gammas searched so far, and its gamma."""
    best: list[tuple[float, FrontierPoint | None]] = []
    for index in range(num_targets):
        points = [(gamma, point) for gamma, result in results.items() if (point := result.points[index]) is not None]
        best.append(min(points, key=lambda item: item[1].loss) if points else (0.0, None))
    return best


def _plan_point(
    gamma: float,
    point: FrontierPoint,
    trials: dict[tuple[float, float, float], Trial],
    importance: Importance,
    held_out: Objective | None,
) -> PlanPoint:
    on_calibration = trials[gamma, point.tau_text, point.tau_vision].evaluation
    realised = {
        "calibration": on_calibration.skip_ratio,
        "text": on_calibration.skip_ratio_text,
        "vision": on_calibration.skip_ratio_vision,
    }
    kl = {"calibration": on_calibration.kl}
    thresholds = PlanPoint(point.target, point.tau_text, point.tau_vision, gamma)
    if held_out is not None:
        plan = SkipPlan((thresholds,), importance.alpha)
        on_held_out = held_out.evaluate(plan.bounds(held_out.num_layers))
        realised["held_out"], kl["held_out"] = on_held_out.skip_ratio, on_held_out.kl
    present: dict[str, Any] = {key: value for key, value in realised.items() if value == value}  # no NaN of an absent modality
    return PlanPoint(point.target, point.tau_text, point.tau_vision, gamma, present, kl)
