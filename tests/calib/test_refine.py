"""The last step onto the frontier, on functions that are known; no model here."""

from bisect import bisect_left
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modes_fx.calib.refine import TOLERANCE, cross, step_down

SHARES = st.lists(st.floats(0, 1), min_size=2, max_size=60).map(sorted)


@given(SHARES, SHARES, st.floats(0, 1))
def test_it_ends_just_above_the_target_or_between_neighbours_or_after_four(
    real: list[float], expected: list[float], target: float
) -> None:
    """Whatever is predicted: what was measured brackets the target ever more narrowly, and never lies outside."""
    size = min(len(real), len(expected))
    real, expected = [*real[: size - 1], 1.0], expected[:size]
    measured: list[int] = []

    def ratio(tau: float) -> float:
        measured.append(int(tau))
        return real[int(tau)]

    cross(ratio, lambda tau: expected[int(tau)], range(size), target, lambda: True)
    below = max((index for index in measured if real[index] < target), default=0)
    above = min(index for index in measured if real[index] >= target)
    assert measured[0] == size - 1  # known already
    assert len(set(measured)) == len(measured) <= 5
    assert 0 not in measured[1:]
    assert below < above
    assert above - below == 1 or real[above] <= target + TOLERANCE or len(measured) == 5


@pytest.mark.parametrize("target", [0.31, 0.5, 0.744])
def test_where_the_prediction_is_right_one_measurement_does(target: float) -> None:
    taus = [step / 1000 for step in range(1001)]
    measured: list[float] = []

    def ratio(tau: float) -> float:
        measured.append(tau)
        return tau**2

    cross(ratio, lambda tau: tau**2, taus, target, lambda: True)
    assert len(measured) == 2
    assert target <= ratio(measured[-1]) <= target + TOLERANCE


def test_nothing_is_measured_once_it_may_not_go_on() -> None:
    measured: list[float] = []

    def ratio(tau: float) -> float:
        measured.append(tau)
        return tau

    cross(ratio, lambda tau: tau, [0.0, 0.5, 1.0], 0.4, lambda: False)
    assert measured == [1.0]


def test_each_threshold_is_lowered_alone_and_no_further_than_its_grid() -> None:
    """g is the mean of both thresholds' ranks; from (.5, .5) the target .4 is crossed at .3 on both ways down."""
    measured: list[tuple[float, float]] = []
    scores = torch.linspace(0, 1, 201, dtype=torch.float64)

    def ratio(text: float, vision: float) -> float:
        measured.append((text, vision))
        return (text + vision) / 2

    def predicted(text: float, vision: float) -> float:
        return (bisect_left(scores.tolist(), text) + bisect_left(scores.tolist(), vision)) / 400

    grids = [[0.0, 0.25, 0.5, 0.75], [0.0, 0.5, 1.0]]
    step_down(ratio, predicted, (0.5, 0.5), grids, [scores, scores], 0.4, lambda: True)
    assert all(text == 0.5 or vision == 0.5 for text, vision in measured)
    assert all(0.25 < text <= 0.5 and 0 < vision <= 0.5 for text, vision in measured)
    for modality in range(2):
        crossed = min(point[modality] for point in measured if sum(point) / 2 >= 0.4 and point[1 - modality] == 0.5)
        assert crossed == pytest.approx(0.3, abs=0.011)


def test_a_threshold_at_the_foot_of_its_grid_stays_there() -> None:
    measured: list[tuple[float, float]] = []

    def ratio(text: float, vision: float) -> float:
        measured.append((text, vision))
        return vision

    scores = torch.linspace(0, 1, 101, dtype=torch.float64)
    step_down(ratio, lambda text, vision: vision, (0.0, 0.5), [[0.0, 1.0], [0.0, 0.5]], [scores, scores], 0.2, lambda: True)
    assert {text for text, _ in measured} == {0.0}
    assert all(later < earlier for (_, earlier), (_, later) in pairwise(measured[:2]))
