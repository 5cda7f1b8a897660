"""Choose the thresholds: for each target skip ratio the pair, and the exponent of alpha, of least loss."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, zip_longest

import torch
from torch import Tensor, nn

from modes_fx.calib.frontier import FrontierPoint, FrontierResult, check_targets, frontier_search
from modes_fx.calib.importance import Importance
from modes_fx.calib.journal import Journal, opened
from modes_fx.calib.objective import Objective, checked, optimized
from modes_fx.calib.refine import TOLERANCE, step_down
from modes_fx.calib.routing import RoutingRecorder
from modes_fx.calib.trials import Trial, Trials, as_point, data_hash, pareto, thresholds, versions, what_determines
from modes_fx.data.batch import Batch
from modes_fx.errors import CalibrationError, UnreachableError
from modes_fx.modality import MODALITIES
from modes_fx.plan import PlanPoint, SkipPlan, describe_model

logger = logging.getLogger(__name__)

GAMMAS = (0.0, 0.25, 0.5, 1.0)
CROWDING = 1.5
"""Exponent of ``score_grid``: how much closer its thresholds lie where more is skipped; 1 makes steps equal."""

_CLOSE = 1.5  # times the least loss on the grids: points up to it are stepped down from
_SPARED = 2  # evaluations kept from the time budget beside those that tighten the bounds: the one that runs, and a slow one


def search(
    model: nn.Module,
    batches: Iterable[Batch],
    importance: Importance,
    targets: Sequence[float] = (0.5, 0.75, 0.875),
    *,
    gammas: Sequence[float] = GAMMAS,
    grid_size: int = 24,
    held_out: Iterable[Batch] | None = None,
    journal: str | os.PathLike[str] | Journal | None = None,
    time_budget: float | None = None,
    on_trial: Callable[[Trial], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> SkipPlan:
    """Find thresholds that reach each target skip ratio at the least KL divergence.

    A frontier search for each gamma over a ``grid_size`` x ``grid_size`` grid of the model's own scores
    ``alpha**gamma * weight``: quantiles, which lie closer together the more is skipped (``score_grid``). From the best
    points of the grids it then steps down to the target itself (``refine``), until half a point above it or as near as the
    model's scores allow, in at most a third more evaluations. The gamma is chosen on ``batches`` too; ``held_out`` is only
    measured.

    Several processes (``accelerate launch``) each pass their share of the data, and all get the same plan.

    The plan's ``provenance["search"]`` says what it cost and how good it is: ``complete``; for each target the loss found on
    the grids and ``lower_bound``, which no choice of theirs can be below (equal, once complete; see ``FrontierResult`` for what
    that rests on); ``refined``, the evaluations off the grids. Its ``frontier`` holds all trials that no other beats in both
    loss and skip ratio, so that it takes targets in between.

    Args:
        model: A model that ``modes_fx.optimize`` takes, optimised or not.
        batches: Calibration data; see ``Objective``.
        importance: From ``layer_importance``.
        targets: Skip ratios in [0, 1]. One that cannot be reached is left out of the plan.
        gammas: Exponents of alpha to try, >= 0; 1 is MoDES as published, 0 leaves alpha out.
        grid_size: Thresholds tried for each modality, >= 2.
        held_out: Other data, on which each chosen point is measured.
        journal: File that each evaluation is written to as it is made, and read from: a search that was cut off goes on where
            it stopped when called again with the same model, data and importance. Or an open journal, all of whose entries the
            caller knows to be of these.
        time_budget: Seconds for all but ``held_out``; then the best thresholds so far are the plan. None: no end.
        on_trial: Called after each evaluation on ``batches``.
        on_progress: Called after each evaluation with (evaluations made, an estimate, mostly too high, of those in all).

    Raises:
        UnreachableError: No target can be reached.
        CalibrationError: None was in the time given, an argument is out of range, or the journal belongs to another search.
    """
    if grid_size < 2 or not gammas or not targets:
        raise CalibrationError("search() needs a grid of at least 2 thresholds, one gamma and one target.")
    check_targets(targets)
    if not all(math.isfinite(gamma) and gamma >= 0 for gamma in gammas):
        raise CalibrationError(f"gammas are {list(gammas)}: expected finite exponents >= 0.")
    if time_budget is not None and not time_budget > 0:
        raise CalibrationError(f"time_budget is {time_budget!r}: expected seconds > 0, or None.")
    started, batches = time.monotonic(), checked(batches)
    held_out = None if held_out is None else checked(held_out)
    with optimized(model):
        data = data_hash(batches)
        records = opened(journal, lambda: what_determines(model, data, importance.alpha))
        objective = Objective(model, batches)
        if len(importance.alpha) != objective.num_layers:
            raise CalibrationError(
                f"The importance is for {len(importance.alpha)} MoE layers, the model has {objective.num_layers}."
            )
        deadline = math.inf if time_budget is None else started + time_budget
        logger.info("search for thresholds: %d targets, gammas %s, grids of %d", len(targets), list(gammas), grid_size)
        trials = Trials(objective, importance.alpha, records, deadline, on_trial)
        routing = objective.routing_weights()
        results = _search_gammas(trials, routing, importance, gammas, targets, grid_size, on_progress)
        chosen = _best(results, len(targets))
        complete = len(results) == len(set(gammas)) and all(result.complete for result in results.values())
        on_grids = len(trials.made)
        if complete:
            _refine(trials, routing, importance, targets, grid_size, on_progress)
        found = [(point.target, _nearest(trials, gamma, point)) for gamma, point in chosen if point is not None]
        if not found and complete:
            raise UnreachableError(f"No target of {list(targets)} can be reached on this data.")
        if not found:
            raise CalibrationError(_out_of_time(targets, time_budget, len(trials.made), journal))
        seconds = time.monotonic() - started
        fresh = None if held_out is None else Objective(model, held_out)
        points = tuple(_plan_point(target, trial, importance, fresh) for target, trial in found)
    search_facts = {
        "evaluations": len(trials.made),
        "refined": len(trials.made) - on_grids,
        "from_journal": len(trials.made) - trials.measured,
        "exhaustive": sum(result.exhaustive for result in results.values()),
        "violations": sum(len(result.violations) for result in results.values()),
        "largest_violation": max(_largest(results, "f"), _largest(results, "g")),
        "largest_violations": {name: _largest(results, name) for name in ("f", "g")},
        "unreachable_targets": [target for target, (_, point) in zip(targets, chosen, strict=True) if point is None],
        "complete": complete,
        "lower_bounds": _lower_bounds(results, set(gammas), targets, chosen),
        "gammas": list(gammas),
        "gammas_searched": list(results),
        "grid_size": grid_size,
        "reference_bytes": objective.reference_bytes,
        "seconds": round(seconds, 3),
    }
    provenance = {
        "data_hash": data,
        "answer_tokens": objective.answer_tokens,
        "importance_mode": importance.mode,
        "search": search_facts,
        "versions": {**versions(), "python": sys.version.split()[0]},
    }
    model_facts = describe_model(getattr(model, "config", None))
    points = tuple(sorted(points, key=lambda point: point.target or 0.0))
    frontier = tuple(as_point(trial) for trial in pareto(trials.made.values()))
    weights = routing.quantiles()
    return SkipPlan(points, importance.alpha, objective.layers, model_facts, provenance, frontier=frontier, weights=weights)


def score_grid(scores: Tensor, counts: Tensor, size: int) -> list[float]:
    """Return ascending thresholds: 0, inner quantiles, and one above every score, in smaller steps the more they skip.

    Skipping changes later scores, so that a step may skip more than its share of the unskipped ones. The last of equal steps
    can take a sixth of a modality's pairs at once, with the best choices in between. Here the share left is the 1.5th power of
    the part of the grid left: the last of 13 steps takes 2%, where equal ones take 8%.

    Args:
        scores: float64 [n] of ``alpha**gamma * weight``, ascending, each the middle of a bin; see ``RoutingRecorder``.
        counts: int64 [n], pairs that have each.
        size: Thresholds wanted; fewer come back where scores are equal.
    """
    if not len(scores):
        return [0.0]
    levels = 1 - torch.linspace(1, 0, size, dtype=torch.float64)[1:-1] ** CROWDING
    below = counts.cumsum(0)
    inner = scores[torch.searchsorted(below.double() / below[-1], levels)].tolist()
    top = float(torch.nextafter(scores[-1].float() * (1 + 2**-7), torch.tensor(torch.inf)))  # the end of its bin
    return sorted({0.0, *inner, top})


def predicted_ratio(scores: Sequence[tuple[Tensor, Tensor]]) -> Callable[[float, float], float]:
    """Return a prediction of the skip ratio, from the unskipped model's scores."""
    below = [torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]) for _, counts in scores]
    pairs = sum(int(counts[-1]) for counts in below)

    def guess(tau_text: float, tau_vision: float) -> float:
        taus = torch.tensor([tau_text, tau_vision], dtype=torch.float64)
        parts = zip(scores, below, taus, strict=True)
        return sum(int(counts[torch.searchsorted(values, tau)]) for (values, _), counts, tau in parts) / max(pairs, 1)

    return guess


def _search_gammas(
    trials: Trials,
    routing: RoutingRecorder,
    importance: Importance,
    gammas: Sequence[float],
    targets: Sequence[float],
    grid_size: int,
    on_progress: Callable[[int, int], None] | None,
) -> dict[float, FrontierResult]:
    """Return the result for each gamma, or for those that the time allowed."""
    results: dict[float, FrontierResult] = {}
    order = sorted(set(gammas), key=lambda gamma: (abs(gamma - 0.5), gamma))  # the likeliest first: its losses prune the others
    for searched, gamma in enumerate(order):
        if trials.out_of_time(_SPARED):
            break
        scores = _scores(routing, importance, gamma)
        at_hand = [math.inf if point is None else point.loss for _, point in _best(results, len(targets))]
        gammas_left = len(order) - searched - 1
        results[gamma] = _search_gamma(trials, gamma, scores, targets, at_hand, grid_size, gammas_left, on_progress)
        if not results[gamma].complete:
            break
    return results


def _search_gamma(
    trials: Trials,
    gamma: float,
    scores: list[tuple[Tensor, Tensor]],
    targets: Sequence[float],
    at_hand: Sequence[float],
    grid_size: int,
    gammas_left: int,
    on_progress: Callable[[int, int], None] | None,
) -> FrontierResult:
    distinct = len(set(targets))
    walks = gammas_left * distinct * (2 * grid_size - 1)

    def on_evaluation(done: int, left: int, tau_text: float, tau_vision: float) -> None:
        if on_progress is not None:
            on_progress(len(trials.made), len(trials.made) + left + walks)

    taus_text, taus_vision = _grids(trials, gamma, scores, grid_size)
    return frontier_search(
        lambda text, vision: trials(gamma, text, vision).evaluation.kl,
        lambda text, vision: trials(gamma, text, vision).evaluation.skip_ratio,
        taus_text,
        taus_vision,
        targets,
        g_guess=predicted_ratio(scores),
        better_than=at_hand,
        on_evaluation=on_evaluation,
        should_stop=lambda: trials.out_of_time(_SPARED + distinct),  # a stopped search tightens each target's bound
    )


def _refine(
    trials: Trials,
    routing: RoutingRecorder,
    importance: Importance,
    targets: Sequence[float],
    grid_size: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Try thresholds between the good points of each target and their neighbours on the grids: first below the best of each."""
    made = list(trials.made.values())
    most = len(made) + len(made) // 3
    scores_of = {gamma: _scores(routing, importance, gamma) for gamma in dict.fromkeys(trial.gamma for trial in made)}

    def may_go_on() -> bool:
        return len(trials.made) < most and not trials.out_of_time(_SPARED)

    starts = [[(target, start) for start in _starts(made, target)] for target in dict.fromkeys(targets)]
    for target, start in filter(None, chain.from_iterable(zip_longest(*starts))):
        if not may_go_on():
            break

        def ratio(tau_text: float, tau_vision: float, gamma: float = start.gamma) -> float:
            found = trials(gamma, tau_text, tau_vision).evaluation.skip_ratio
            if on_progress is not None:
                on_progress(len(trials.made), most)
            return found

        scores = scores_of[start.gamma]
        step_down(
            ratio,
            predicted_ratio(scores),
            (start.tau_text, start.tau_vision),
            _grids(trials, start.gamma, scores, grid_size),
            [values for values, _ in scores],
            target,
            may_go_on,
        )
    if on_progress is not None:
        on_progress(len(trials.made), len(trials.made))


def _starts(made: Sequence[Trial], target: float) -> list[Trial]:
    """Return what to step down from: the minimal points that reach a target at nearly the least loss, the best first.

    Not the best alone: a grid oversteps a target by more at one point than at another, and what two of them lose may be equal
    by that.
    """
    enough = [trial for trial in made if trial.evaluation.skip_ratio >= target]
    close = min((trial.evaluation.kl for trial in enough), default=0.0) * _CLOSE
    near = [trial for trial in enough if trial.evaluation.kl <= close]
    near = [trial for trial in near if not any(_below(other, trial.gamma, trial) for other in enough if other is not trial)]
    return sorted(near, key=lambda trial: trial.evaluation.kl)


def _below(trial: Trial, gamma: float, point: Trial | FrontierPoint) -> bool:
    """Return whether neither threshold of a trial is larger than a point's of the same gamma."""
    return trial.gamma == gamma and trial.tau_text <= point.tau_text and trial.tau_vision <= point.tau_vision


def _nearest(trials: Trials, gamma: float, point: FrontierPoint) -> Trial:
    """Return the trial of least loss that ends within the tolerance above a target, or, without one, above it at all.

    A trial is near for nothing if it loses more than the best point of the grids and is none of those that lie below it, where
    the loss is no higher but for noise.
    """

    def is_near(trial: Trial) -> bool:
        found = trial.evaluation
        return found.skip_ratio <= point.target + TOLERANCE and (_below(trial, gamma, point) or found.kl <= point.loss)

    enough = [trial for trial in trials.made.values() if trial.evaluation.skip_ratio >= point.target]
    near = [trial for trial in enough if is_near(trial)]
    return min(near or enough, key=lambda trial: (trial.evaluation.kl, -trial.evaluation.skip_ratio, trial.tau_text))


def _scores(routing: RoutingRecorder, importance: Importance, gamma: float) -> list[tuple[Tensor, Tensor]]:
    return [routing.scores(m, [row[m] ** gamma for row in importance.alpha]) for m in range(len(MODALITIES))]


def _grids(trials: Trials, gamma: float, scores: Sequence[tuple[Tensor, Tensor]], size: int) -> list[list[float]]:
    return trials.grids(gamma, size, lambda: [score_grid(*of, size) for of in scores])


def _lower_bounds(
    results: Mapping[float, FrontierResult],
    gammas: set[float],
    targets: Sequence[float],
    chosen: Sequence[tuple[float, FrontierPoint | None]],
) -> list[dict[str, float | None]]:
    """Return, for each target, the loss found and what none can be below: over all gammas, and over those that were begun.

    None stands for infinity: nothing found, or nothing on the grids that reaches the target.
    """
    bounds: list[dict[str, float | None]] = []
    for index, (target, (_, point)) in enumerate(zip(targets, chosen, strict=True)):
        begun = max(min(result.lower_bounds[index] for result in results.values()), 0.0)  # a divergence is never negative
        whole = begun if set(results) == gammas else 0.0
        row = {"kl": math.inf if point is None else point.loss, "lower_bound": whole, "lower_bound_of_gammas_searched": begun}
        bounds.append({"target": target, **{name: value if value < math.inf else None for name, value in row.items()}})
    return bounds


def _largest(results: Mapping[float, FrontierResult], function: str) -> float:
    sizes = (item.size for result in results.values() for item in result.violations if item.function == function)
    return max(sizes, default=0.0)


def _out_of_time(targets: Sequence[float], time_budget: float | None, evaluations: int, journal: object) -> str:
    advice = "and name a journal, so that a second run goes on from this one" if journal is None else "the journal keeps those"
    return (
        f"The time budget of {time_budget:g} s was over after {evaluations} evaluations, before any target of {list(targets)} "
        f"was reached. Give it more time; {advice}."
    )


def _best(results: Mapping[float, FrontierResult], num_targets: int) -> list[tuple[float, FrontierPoint | None]]:
    """Return, for each target, the point of least loss over all gammas searched so far, and its gamma."""
    best: list[tuple[float, FrontierPoint | None]] = []
    for index in range(num_targets):
        points = [(gamma, point) for gamma, result in results.items() if (point := result.points[index]) is not None]
        best.append(min(points, key=lambda item: item[1].loss) if points else (0.0, None))
    return best


def _plan_point(target: float, trial: Trial, importance: Importance, held_out: Objective | None) -> PlanPoint:
    chosen = as_point(trial, target)
    if held_out is None:
        return chosen
    plan = thresholds(importance.alpha, trial.gamma, trial.tau_text, trial.tau_vision)
    fresh = held_out.evaluate(plan.bounds(held_out.num_layers))
    realised, kl = {**chosen.realised, "held_out": fresh.skip_ratio}, {**chosen.kl, "held_out": fresh.kl}
    return replace(chosen, realised=realised, kl=kl)
