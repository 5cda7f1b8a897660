"""Nearer to a target than a grid comes: the last step onto the frontier, taken again in finer ones.

The best point of a grid is minimal: with either threshold one step lower it misses its target. So the target is crossed on the
way down to each of these two neighbours, and there the loss is no higher, if it is monotone. The crossing is looked for among
the scores that the model has, by false position (regula falsi) over the skip ratio that these predict: the real one follows it
closely, since what is skipped in earlier layers changes later routing but little.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from torch import Tensor

from modes_fx.calib.frontier_engine import ThresholdFunction

TOLERANCE = 0.005
"""How far above its target a skip ratio may end."""

_STEPS = 4  # evaluations on the way down to one neighbour


def step_down(
    ratio: ThresholdFunction,
    predicted: ThresholdFunction,
    taus: tuple[float, float],
    grids: Sequence[Sequence[float]],
    scores: Sequence[Tensor],
    target: float,
    may_go_on: Callable[[], bool],
) -> None:
    """Measure between the best point of two grids and the point one threshold lower on each.

    Args:
        ratio: Measures the skip ratio under (tau_text, tau_vision); known at ``taus``.
        predicted: A prediction of it, non-decreasing in each argument.
        taus: The best point that reaches the target.
        grids: The thresholds of text and of vision, ascending.
        scores: float64, the scores of text and of vision that thresholds tell apart, ascending.
        target: Skip ratio.
        may_go_on: Asked before each measurement.
    """

    def along(function: ThresholdFunction, modality: int) -> Callable[[float], float]:
        return lambda tau: function(*(tau if index == modality else own for index, own in enumerate(taus)))

    for modality, (grid, tau) in enumerate(zip(grids, taus, strict=True)):
        if place := list(grid).index(tau):
            low = grid[place - 1]
            values = scores[modality].unique()
            between = values[(values > low) & (values < tau)].tolist()
            cross(along(ratio, modality), along(predicted, modality), [low, *between, tau], target, may_go_on)


def cross(
    ratio: Callable[[float], float],
    predicted: Callable[[float], float],
    taus: Sequence[float],
    target: float,
    may_go_on: Callable[[], bool],
) -> None:
    """Measure the skip ratio until it is just above the target, or until there is no threshold left to try.

    Args:
        ratio: Measures the skip ratio under a threshold; known for the last.
        predicted: A prediction of it, non-decreasing.
        taus: Thresholds, ascending: the first misses the target, the last reaches it.
        target: Skip ratio.
        may_go_on: Asked before each measurement.
    """
    below, above = 0, len(taus) - 1
    reached = ratio(taus[above])
    missed = reached - (predicted(taus[above]) - predicted(taus[below]))
    for _ in range(_STEPS):
        if above - below <= 1 or reached <= target + TOLERANCE or not may_go_on():
            return
        start, end = predicted(taus[below]), predicted(taus[above])
        share = (target + TOLERANCE / 2 - missed) / max(reached - missed, 1e-12)
        aim = start + min(max(share, 0.0), 1.0) * (end - start)
        index = bisect_left(taus, aim, below + 1, above - 1, key=predicted)
        found = ratio(taus[index])
        if found >= target:
            above, reached = index, found
        else:
            below, missed = index, found
