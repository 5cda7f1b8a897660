"""A frontier search that is stopped: what it keeps, what it says about the rest, and how it tells of its progress."""

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.calib.frontiers import SMOOTH, Table, exhaustive, problems, search


@settings(max_examples=80)
@given(problems(), st.integers(0, 20), st.data())
def test_a_stopped_search_keeps_what_it_found_and_bounds_what_it_did_not(
    problem: tuple[Table, Table, list[float]], limit: int, data: st.DataObject
) -> None:
    f, g, targets = problem
    evaluated: list[tuple[int, int]] = []
    at_hand = [data.draw(st.sampled_from([math.inf, *(value for row in f for value in row)])) for _ in targets]
    result = search(
        f, g, targets, better_than=at_hand, should_stop=lambda: len(evaluated) >= limit,
        on_evaluation=lambda done, left, text, vision: evaluated.append((round(2 * text) - 1, round(2 * vision) - 1)),
    )  # fmt: skip
    assert result.evaluations == len(evaluated) <= limit + len(set(targets))
    assert result.complete or len(evaluated) >= limit
    whole = search(f, g, targets, better_than=at_hand)
    assert result.complete == (whole.evaluations <= limit)
    hands = dict(zip(targets, at_hand, strict=True))  # of a repeated target the easier loss counts
    hands = {target: max(loss for other, loss in zip(targets, at_hand, strict=True) if other == target) for target in hands}
    for target, point, bound in zip(targets, result.points, result.lower_bounds, strict=True):
        best = exhaustive(f, g, target)
        assert bound <= min(math.inf if best is None else best, hands[target])
        feasible = [f[q][p] for q, p in evaluated if g[q][p] >= target]
        if not result.complete:
            assert (point and point.loss) == min(feasible, default=None)
        else:
            assert bound == min(hands[target], math.inf if best is None else best)


def test_the_bound_of_a_stopped_search_rises_to_the_optimum() -> None:
    f, g = SMOOTH["balanced"]
    bounds = []
    for limit in (0, 10, 16, 40, 10_000):
        count = itertools.count()
        stop = lambda count=count, limit=limit: next(count) >= limit  # noqa: E731
        bounds.append(search(f, g, [0.75], should_stop=stop).lower_bounds[0])
    assert bounds == sorted(bounds)
    assert bounds[0] == 0.0
    assert 0.3 * bounds[-1] < bounds[2] < bounds[-1] == exhaustive(f, g, 0.75)


def test_progress_is_reported_once_a_point() -> None:
    f, g = SMOOTH["balanced"]
    calls: list[tuple[int, int, float, float]] = []
    result = search(f, g, [0.75], on_evaluation=lambda *call: calls.append(call))
    assert [done for done, *_ in calls] == list(range(1, result.evaluations + 1))
    assert len({call[2:] for call in calls}) == result.evaluations
    left = [call[1] for call in calls]
    assert left == sorted(left, reverse=True)
    assert left[0] < 2 * 100
    assert left[-1] == 0
