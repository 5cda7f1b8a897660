"""The frontier search finds what exhaustive search and the published walk find, with fewer evaluations."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.calib.frontiers import (
    FAST,
    SMOOTH,
    TARGETS,
    Table,
    assert_exact_within_bounds,
    exhaustive,
    losses,
    problems,
    search,
    two_pointer_walk,
)


@FAST
@given(problems())
def test_equals_exhaustive_search_within_the_bounds(problem: tuple[Table, Table, list[float]]) -> None:
    assert_exact_within_bounds(*problem, search(*problem))


@FAST
@given(problems(), st.data())
def test_any_guess_leaves_answer_and_bounds(problem: tuple[Table, Table, list[float]], data: st.DataObject) -> None:
    f, g, targets = problem
    noise = data.draw(st.randoms(use_true_random=False))
    guess = data.draw(
        st.sampled_from(
            [
                lambda text, vision: g[round(2 * text) - 1][round(2 * vision) - 1],
                lambda text, vision: 1 - g[round(2 * text) - 1][round(2 * vision) - 1],
                lambda text, vision: noise.uniform(-3, 3),
                lambda text, vision: math.nan,
                lambda text, vision: math.inf,
                lambda text, vision: 1e300 * text,
            ]
        )
    )
    assert_exact_within_bounds(f, g, targets, search(f, g, targets, g_guess=guess))


@FAST
@given(problems(), st.data())
def test_losses_at_hand_prune_but_hide_nothing_lower(problem: tuple[Table, Table, list[float]], data: st.DataObject) -> None:
    f, g, targets = problem
    at_hand = [data.draw(st.sampled_from([math.inf, 0.0, *(value for row in f for value in row)])) for _ in targets]
    result = search(f, g, targets, better_than=at_hand)
    distinct, (columns, rows) = len(set(targets)), (len(f), len(f[0]))
    assert result.evaluations <= distinct * (columns + rows)
    for target, loss, point in zip(targets, at_hand, result.points, strict=True):
        best = exhaustive(f, g, target)
        if best is not None and best < loss:
            assert point is not None
            assert point.loss == best
        elif point is not None:
            assert best is not None
            assert point.loss >= best


@pytest.mark.parametrize("columns", [30, 17])
@pytest.mark.parametrize("slope", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("guided", [False, True])
def test_bounds_hold_where_nothing_can_be_pruned(columns: int, slope: float, guided: bool) -> None:
    # A diagonal frontier on which every loss ties, above infeasible points that all cost nothing: the walk's worst.
    rows = 30
    g = [[float(q * slope + p >= rows - 1) for p in range(rows)] for q in range(columns)]
    guess = (lambda text, vision: 0.3) if guided else None
    result = search(g, g, [1.0], g_guess=guess)
    assert_exact_within_bounds(g, g, [1.0], result)


@FAST
@given(problems())
def test_the_walk_agrees_and_its_frontier_descends(problem: tuple[Table, Table, list[float]]) -> None:
    f, g, targets = problem
    for target, loss in zip(targets, losses(search(f, g, targets)), strict=True):
        frontier = [next((p for p, ratio in enumerate(row) if ratio >= target), len(row)) for row in g]
        assert all(ratio >= target for row, p in zip(g, frontier, strict=True) for ratio in row[p:])
        assert frontier == sorted(frontier, reverse=True)
        assert two_pointer_walk(f, g, target)[0] == loss


@FAST
@given(problems(), st.randoms(use_true_random=False))
def test_order_and_repeats_of_targets_do_not_matter(problem: tuple[Table, Table, list[float]], shuffler: object) -> None:
    f, g, targets = problem
    shuffled = [*targets, *targets]
    shuffler.shuffle(shuffled)  # type: ignore[attr-defined]
    result, other = search(f, g, targets), search(f, g, shuffled)
    assert other.evaluations == result.evaluations
    assert other.points == tuple(result.points[targets.index(target)] for target in shuffled)


def test_infeasible_target_has_no_point() -> None:
    table = [[(q + p) / 20 for p in range(8)] for q in range(6)]
    result = search(table, table, [0.9, 0.3, 0.61])
    assert [point and point.target for point in result.points] == [None, 0.3, None]


def test_an_empty_frontier_and_a_whole_grid_cost_little() -> None:
    never = [[0.1] * 50 for _ in range(50)]
    assert search(never, never, [0.5]).evaluations <= 12
    always = [[0.9] * 50 for _ in range(50)]
    assert search(always, always, [0.5]).evaluations <= 12


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("guided", [False, True])
def test_smooth_problem_takes_a_quarter_of_three_walks(name: str, guided: bool) -> None:
    f, g = SMOOTH[name]
    guess = (lambda text, vision: g[round(2 * text) - 1][round(2 * vision) - 1]) if guided else None
    result = search(f, g, TARGETS, g_guess=guess)
    walks = [two_pointer_walk(f, g, target) for target in TARGETS]
    assert losses(result) == [loss for loss, _ in walks]
    assert_exact_within_bounds(f, g, TARGETS, result)
    assert result.evaluations <= 0.25 * sum(len(visited) for _, visited in walks)
