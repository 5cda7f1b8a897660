"""Reaching a skip ratio by one scale, on functions whose answer is known."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modes_fx.calib.objective import Evaluation
from modes_fx.measure.compare.tuning import Tuner

FAST = settings(max_examples=40)


def measuring(ratio: Callable[[float], float]) -> tuple[Callable[[float], Evaluation], list[float]]:
    asked: list[float] = []

    def measure(scale: float) -> Evaluation:
        asked.append(scale)
        return Evaluation(0.0, ratio(scale), math.nan, math.nan, 0.0)

    return measure, asked


@pytest.mark.parametrize("width", [1e-3, 0.3, 1.0, 40.0, 1e4])
@FAST
@given(target=st.floats(0.01, 0.99))
def test_a_smooth_ratio_is_reached_within_the_tolerance_and_from_above(width: float, target: float) -> None:
    measure, asked = measuring(lambda scale: 1 - math.exp(-scale / width))
    tuned = Tuner(measure, tolerance=0.002).reach(target)
    assert tuned is not None
    assert tuned.reached
    assert target <= tuned.evaluation.skip_ratio <= target + 0.002
    assert len(asked) <= 40


@FAST
@given(
    steps=st.lists(st.tuples(st.floats(0.01, 9.0), st.floats(0.01, 1.0)), min_size=1, max_size=12), target=st.floats(0.01, 1.0)
)
def test_a_ratio_that_jumps_ends_at_the_smallest_step_that_is_enough(steps: list[tuple[float, float]], target: float) -> None:
    def ratio(scale: float) -> float:
        return sum(height for at, height in steps if scale >= at) / 13

    measure, asked = measuring(ratio)
    tuned = Tuner(measure, tolerance=0.0).reach(target)
    levels = [ratio(at) for at, _ in steps if ratio(at) >= target]
    assert (tuned is None) == (not levels)
    if tuned is not None:
        assert tuned.evaluation.skip_ratio == pytest.approx(min(levels))
        assert tuned.reached == (tuned.evaluation.skip_ratio <= target)
    assert len(asked) <= 90


def test_what_a_rule_cannot_skip_is_said_with_what_it_can() -> None:
    measure, _ = measuring(lambda scale: min(scale, 0.75))
    tuner = Tuner(measure)
    assert tuner.reach(0.8) is None
    assert tuner.largest_ratio == 0.75
    assert tuner.reach(0.75) is not None


def test_targets_share_what_was_measured() -> None:
    measure, asked = measuring(lambda scale: scale / (1 + scale))
    tuner = Tuner(measure)
    for target in (0.5, 0.75, 0.5):
        assert tuner.reach(target) is not None
    assert len(asked) == len(set(asked))


def test_a_rule_with_a_few_settings_takes_the_first_that_is_enough() -> None:
    measure, asked = measuring(lambda scale: scale / 8)
    tuned = Tuner(measure, scales=range(9)).reach(0.67)
    assert tuned is not None
    assert (tuned.scale, tuned.reached, max(asked)) == (6, False, 6)
