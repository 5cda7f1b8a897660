"""What the frontier search makes of functions that are not monotone, or no numbers, and of malformed input."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modes_fx.calib.frontier import frontier_search
from modes_fx.errors import CalibrationError
from tests.calib.frontiers import FAST, Table, exhaustive, losses, problems, search


@FAST
@given(problems(), st.data())
def test_violations_are_reported_and_targets_still_met(problem: tuple[Table, Table, list[float]], data: st.DataObject) -> None:
    f, g, targets = problem
    for table, name in ((f, "f"), (g, "g")):
        for _ in range(data.draw(st.integers(0, 6), label=name)):
            q, p = data.draw(st.integers(0, len(f) - 1)), data.draw(st.integers(0, len(f[0]) - 1))
            table[q][p] += data.draw(st.sampled_from([-0.3, 0.3]))
    evaluated: list[tuple[int, int]] = []
    result = search(
        f,
        g,
        targets,
        on_evaluation=lambda done, left, text, vision: evaluated.append((round(2 * text) - 1, round(2 * vision) - 1)),
    )
    for violation in result.violations:
        (lower_q, lower_p), (upper_q, upper_p) = (
            (round(2 * text) - 1, round(2 * vision) - 1) for text, vision in (violation.lower, violation.upper)
        )
        table = f if violation.function == "f" else g
        assert {(lower_q, lower_p), (upper_q, upper_p)} <= set(evaluated)
        assert lower_q <= upper_q
        assert lower_p <= upper_p
        assert violation.size == table[lower_q][lower_p] - table[upper_q][upper_p] > 0
    noticed = any(g[q][p] > g[x][y] + 1e-6 for (q, p), (x, y) in itertools.product(evaluated, repeat=2) if q <= x and p <= y)
    assert noticed == any(violation.function == "g" for violation in result.violations)
    for target, point in zip(targets, result.points, strict=True):
        feasible = [f[q][p] for q, p in evaluated if g[q][p] >= target]
        assert (point is None) == (not feasible)
        if point:
            assert point.ratio >= target
        if point and result.violations:
            assert point.loss == min(feasible)


@settings(max_examples=100)
@given(problems(), st.sampled_from([0.0, 1e-15, 1e-9, 1e-3, 0.1]), st.sampled_from([0.0, 1e-15, 1e-9, 1e-3, 0.1]), st.data())
def test_noise_costs_no_more_than_twice_its_size(
    problem: tuple[Table, Table, list[float]], f_noise: float, g_noise: float, data: st.DataObject
) -> None:
    """As the rounding of a model does: plateaus, ties and steps, and on them decreases below and above what is reported."""
    f, g, targets = problem
    noise = data.draw(st.randoms(use_true_random=False))
    f = [[value + noise.uniform(-f_noise, f_noise) for value in row] for row in f]
    g = [[value + noise.uniform(-g_noise, g_noise) for value in row] for row in g]
    result = search(f, g, targets)
    for target, point in zip(targets, result.points, strict=True):
        reached = exhaustive(f, g, target + 2 * g_noise)  # what noise in g cannot have hidden
        if reached is not None:
            assert point is not None
            assert point.loss <= reached + 2 * f_noise + 1e-12
        assert point is None or point.ratio >= target
    for violation in result.violations:
        assert violation.size <= 2 * max(f_noise, g_noise) + 1e-12


def test_a_violation_found_at_the_largest_corner_keeps_the_feasible_point() -> None:
    g = [[0.0, 0.6], [0.0, 0.2]]
    result = search([[0.0, 1.0], [1.0, 2.0]], g, [0.5])
    assert losses(result) == [1.0]
    assert {violation.function for violation in result.violations} <= {"g"}


def test_as_many_losses_at_hand_as_targets_or_an_error() -> None:
    with pytest.raises(CalibrationError, match="better_than has 1 losses for 2 targets"):
        search([[1.0]], [[1.0]], [0.5, 0.6], better_than=[0.1])


@pytest.mark.parametrize(
    ("text", "vision", "targets", "message"),
    [
        ([], [1.0], [0.5], "taus_text is empty"),
        ([1.0], [], [0.5], "taus_vision is empty"),
        ([1.0], [1.0], [], "targets is empty"),
        ([1.0, 1.0], [1.0], [0.5], r"taus_text\[1\] is 1.0, after 1.0: expected strictly ascending"),
        ([1.0], [2.0, 1.0], [0.5], r"taus_vision\[1\] is 1.0, after 2.0"),
        ([math.nan], [1.0], [0.5], r"taus_text\[0\] is nan"),
        ([1.0], [0.5, math.inf], [0.5], r"taus_vision\[1\] is inf"),
        ([-0.1], [1.0], [0.5], r"taus_text\[0\] is -0.1: expected a finite threshold >= 0"),
        ([1.0], [1.0], [0.5, 1.1], r"targets\[1\] is 1.1: expected a skip ratio in \[0, 1\]"),
        ([1.0], [1.0], [math.nan], r"targets\[0\] is nan"),
    ],
)
def test_malformed_input_is_named(text: list[float], vision: list[float], targets: list[float], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        frontier_search(max, max, text, vision, targets)


@pytest.mark.parametrize("name", ["f", "g"])
def test_nan_names_the_function_and_the_point(name: str) -> None:
    functions = {"f": max, "g": lambda text, vision: 1.0, name: lambda text, vision: math.nan}
    with pytest.raises(CalibrationError, match=rf"^{name} returned NaN at tau_text=0.5, tau_vision=0.5"):
        frontier_search(functions["f"], functions["g"], [0.5], [0.5], [0.5])


def test_infinite_losses_are_only_the_worst() -> None:
    g = [[(q + p) / 18 for p in range(10)] for q in range(10)]
    f = [[math.inf if q > 4 else float(q + p) for p in range(10)] for q in range(10)]
    assert losses(search(f, g, [0.5, 1.0])) == [exhaustive(f, g, 0.5), math.inf]
