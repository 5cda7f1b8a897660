"""Exact search for the two thresholds that reach a skip ratio at the least loss.

    minimise f(tau_text, tau_vision)  subject to  g(tau_text, tau_vision) >= rho,   for each target rho

over a grid, with f and g non-decreasing in each argument (MoDES, arXiv 2511.15690, assumption 1). The answer lies on
the frontier of minimal feasible points, which the published two-pointer walk follows whole. This search settles most of
the frontier without visiting it. An evaluated point serves every target, and twice over:

    g(q, p) < rho    no point below and to the left of it is feasible
    f(q, p) >= best  no point above and to the right of it is better; g >= rho says the same of all but itself

so the search seeks the few points that together leave no cell of the grid open (``frontier_engine``). For *any*
monotone f and g, and any guess however wrong: ``evaluations <= targets * (columns + rows)`` and
``f_evaluations <= targets * columns``, the published walk's own worst case. Pure Python: f and g are opaque functions.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from modes_fx.calib.frontier_engine import Cell, OnEvaluation, Search, ThresholdFunction
from modes_fx.errors import CalibrationError

_TOLERANCE = 1e-9  # relative; below it a decrease is rounding, not a violation


@dataclass(frozen=True)
class FrontierPoint:
    """The best thresholds found for one target.

    Attributes:
        target: Skip ratio asked for, in [0, 1].
        tau_text: Threshold for text tokens, one of the grid's.
        tau_vision: Threshold for visual tokens, one of the grid's.
        loss: f at the point, in nats.
        ratio: g evaluated at the point, never below ``target``.
    """

    target: float
    tau_text: float
    tau_vision: float
    loss: float
    ratio: float


@dataclass(frozen=True)
class Violation:
    """A decrease of f or g between two evaluated points, where raising thresholds should never lower either.

    Attributes:
        function: ``"f"`` or ``"g"``.
        lower: ``(tau_text, tau_vision)`` of the point with the smaller thresholds.
        upper: The same of the point whose thresholds are both at least as large.
        size: Value at ``lower`` minus value at ``upper``, in nats for f; positive.
    """

    function: Literal["f", "g"]
    lower: tuple[float, float]
    upper: tuple[float, float]
    size: float


@dataclass(frozen=True)
class FrontierResult:
    """Outcome of a frontier search.

    Attributes:
        points: One point a target, in the order given; None where no evaluated point reaches the target. With a
            monotone g that means that none on the grid does.
        f_evaluations: Calls of f made.
        lower_bounds: For each target what no point of the grid that reaches it can cost less than, in nats, by the evaluations
            made; -inf while they say nothing. The point's own loss where the search is complete (with ``better_than``, the
            smaller of the two), infinite where nothing reaches the target. It rests on f and g being monotone.
        complete: Whether the search went on to the end; False where ``should_stop`` ended it.
        evaluations: Grid points at which g was called, at some f too: the forward passes, where one pass gives both.
        exhaustive: Points on the grid.
        violations: Decreases seen, at most one (the largest) for each function and upper point. Empty means that the
            evaluated points are consistent with monotone f and g. Where it is not, each point still meets its target
            by its own evaluation and is the best of the evaluated points, but a better one may have been missed. Where all that
            is wrong is noise, of at most e in f and d in g, no point that reaches the target + 2d is better by more than 2e.
    """

    points: tuple[FrontierPoint | None, ...]
    lower_bounds: tuple[float, ...]
    complete: bool
    f_evaluations: int
    evaluations: int
    exhaustive: int
    violations: tuple[Violation, ...]


def frontier_search(
    f: ThresholdFunction,
    g: ThresholdFunction,
    taus_text: Sequence[float],
    taus_vision: Sequence[float],
    targets: Sequence[float],
    *,
    g_guess: ThresholdFunction | None = None,
    better_than: Sequence[float] | None = None,
    on_evaluation: OnEvaluation | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> FrontierResult:
    """Find, for each target skip ratio, the thresholds with the smallest loss among those that reach it.

    The loss is that of an exhaustive search whenever f and g are non-decreasing in each argument. Points that tie in
    loss are not all looked at; among those that were, the higher ratio wins, then the smaller ``tau_text``.

    Args:
        f: ``f(tau_text, tau_vision)``, the loss in nats. Asked only where g was, at most once a point.
        g: ``g(tau_text, tau_vision)``, the skip ratio in [0, 1]; asked at most once a point.
        taus_text: Thresholds for text tokens, finite, >= 0, strictly ascending.
        taus_vision: Thresholds for visual tokens, likewise.
        targets: Skip ratios in [0, 1], in any order; repeats cost nothing.
        g_guess: Cheap prediction of g, called many times. It decides only where to look first: a good one saves
            evaluations, a bad one costs some (within the bound), and neither changes the loss found.
        better_than: For each target a loss in nats that is already at hand (inf where none is); what cannot be lower is not
            looked at. A target's point is then None, or no better than this, where nothing lower exists.
        on_evaluation: Called as ``on_evaluation(done, left, tau_text, tau_vision)`` after each new grid point; walking along
            what is still open would take ``left`` more at most.
        should_stop: Asked before each new grid point; True ends the search with what it has found, after
            one more for each target at most, for the sake of ``lower_bounds``.

    Returns:
        The points, what they cost, and the violations of monotonicity seen on the way.

    Raises:
        CalibrationError: If a list is empty or malformed, or f or g returns NaN (the message names the point).
    """
    _check_grid("taus_text", taus_text)
    _check_grid("taus_vision", taus_vision)
    check_targets(targets)
    if better_than is not None and len(better_than) != len(targets):
        raise CalibrationError(f"better_than has {len(better_than)} losses for {len(targets)} targets: expected one each.")
    at_hand: dict[float, float] = {}
    for target, loss in zip(targets, better_than or [math.inf] * len(targets), strict=True):
        at_hand[target] = max(loss, at_hand.get(target, -math.inf))  # of a repeated target, the loss easier to beat
    search = Search(f, g, taus_text, taus_vision, at_hand, g_guess, on_evaluation, should_stop)
    search.run()
    violations = (*_violations("g", search.ratios), *_violations("f", search.losses))
    if violations or not search.complete:
        # Dominance does not (or not yet) tell the better of two feasible points, and the passes are paid for: compare them all.
        for q, p in search.ratios:
            search.ask_loss(q, p)
        violations = (*_violations("g", search.ratios), *_violations("f", search.losses))
    return FrontierResult(
        points=tuple(_best_point(search, target) for target in targets),
        lower_bounds=tuple(search.lower_bound(target) for target in targets),
        complete=search.complete,
        f_evaluations=len(search.losses),
        evaluations=len(search.ratios),
        exhaustive=len(taus_text) * len(taus_vision),
        violations=tuple(
            Violation(
                name,
                (taus_text[lower[0]], taus_vision[lower[1]]),
                (taus_text[upper[0]], taus_vision[upper[1]]),
                size,
            )
            for name, lower, upper, size in violations
        ),
    )


def _best_point(search: Search, target: float) -> FrontierPoint | None:
    feasible = [
        (search.losses[cell], -ratio, cell)
        for cell, ratio in search.ratios.items()
        if ratio >= target and cell in search.losses
    ]
    if not feasible:
        return None
    loss, negated, (q, p) = min(feasible)
    return FrontierPoint(target, search.taus_text[q], search.taus_vision[p], loss, -negated)


def _violations(name: Literal["f", "g"], values: dict[Cell, float]) -> Iterator[tuple[Literal["f", "g"], Cell, Cell, float]]:
    """Yield the largest decrease into each evaluated cell from a cell below and to the left of it."""
    seen: list[tuple[Cell, float]] = []
    for upper, value in sorted(values.items()):
        lower, highest = max(
            ((cell, other) for cell, other in seen if cell[1] <= upper[1]),
            key=lambda item: item[1],
            default=(upper, value),
        )
        if highest - value > _TOLERANCE * max(1.0, abs(value)):
            yield name, lower, upper, highest - value
        seen.append((upper, value))


def _check_grid(name: str, taus: Sequence[float]) -> None:
    if not len(taus):
        raise CalibrationError(f"{name} is empty: expected at least one threshold.")
    for i, tau in enumerate(taus):
        if not (math.isfinite(tau) and tau >= 0):
            raise CalibrationError(f"{name}[{i}] is {tau!r}: expected a finite threshold >= 0.")
        if i and tau <= taus[i - 1]:
            raise CalibrationError(
                f"{name}[{i}] is {tau!r}, after {taus[i - 1]!r}: expected strictly ascending thresholds. "
                "Sort them and drop repeats."
            )


def check_targets(targets: Sequence[float]) -> None:
    """Refuse targets that are no skip ratios.

    Raises:
        CalibrationError: There is none, or one is outside of [0, 1].
    """
    if not len(targets):
        raise CalibrationError("targets is empty: expected at least one skip ratio.")
    for i, target in enumerate(targets):
        if not 0 <= target <= 1:
            raise CalibrationError(f"targets[{i}] is {target!r}: expected a skip ratio in [0, 1].")
