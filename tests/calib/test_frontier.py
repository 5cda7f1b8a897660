"""The frontier search against two independent oracles: exhaustive search and the published two-pointer walk."""

import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modes_fx.calib.frontier import FrontierResult, frontier_search
from modes_fx.calib.frontier_state import LocalModel, Region
from modes_fx.errors import CalibrationError

Table = list[list[float]]  # [text index][vision index]
FAST = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def taus(count: int) -> list[float]:
    return [0.5 * (i + 1) for i in range(count)]


def lookup(table: Table) -> Callable[[float, float], float]:
    """A table as a function of thresholds that refuses to be asked for the same point twice."""
    asked = set()

    def function(tau_text: float, tau_vision: float) -> float:
        assert (tau_text, tau_vision) not in asked
        asked.add((tau_text, tau_vision))
        return table[round(2 * tau_text) - 1][round(2 * tau_vision) - 1]

    return function


def search(f: Table, g: Table, targets: list[float], **options: object) -> FrontierResult:
    return frontier_search(lookup(f), lookup(g), taus(len(f)), taus(len(f[0])), targets, **options)


def losses(result: FrontierResult) -> list[float | None]:
    return [point and point.loss for point in result.points]


def exhaustive(f: Table, g: Table, target: float) -> float | None:
    feasible = [f[q][p] for q, p in itertools.product(range(len(f)), range(len(f[0]))) if g[q][p] >= target]
    return min(feasible, default=None)


def two_pointer_walk(f: Table, g: Table, target: float) -> tuple[float | None, set[tuple[int, int]]]:
    """The published walk: its best loss, and the points at which it evaluates g (f it asks at some of these)."""
    best, visited, p = None, set(), len(f[0]) - 1
    for q in range(len(f)):
        recorded = None
        while p >= 0:
            visited.add((q, p))
            if g[q][p] < target:
                break
            recorded, p = p, p - 1
        if recorded is not None:
            best = f[q][recorded] if best is None else min(best, f[q][recorded])
    return best, visited


def accumulated(steps: list[list[int]]) -> list[list[int]]:
    """The sums over all cells below and to the left, which are non-decreasing in each index."""
    rows = [list(itertools.accumulate(row)) for row in steps]
    return [list(column) for column in zip(*map(itertools.accumulate, zip(*rows, strict=True)), strict=True)]


@st.composite
def monotone(draw: st.DrawFn, columns: int, rows: int) -> Table:
    """Plateaus, jumps and ties: sums of mostly zero steps, maxima of two staircases, or nothing but one value."""
    step = st.sampled_from(draw(st.sampled_from([[0, 0, 0, 1], [0, 1], [0, 0, 1, 9], [1, 2, 3], [0]])))
    table = accumulated(draw(st.lists(st.lists(step, min_size=rows, max_size=rows), min_size=columns, max_size=columns)))
    if draw(st.booleans()):
        by_column = sorted(draw(st.lists(st.integers(0, 9), min_size=columns, max_size=columns)))
        by_row = sorted(draw(st.lists(st.integers(0, 9), min_size=rows, max_size=rows)))
        combine = draw(st.sampled_from([max, min, lambda a, b: a + b]))
        table = [[combine(a, b) for b in by_row] for a in by_column]
    return [[float(value) for value in row] for row in table]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Table, Table, list[float]]:
    columns, rows = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    f, g = draw(monotone(columns, rows)), draw(monotone(columns, rows))
    g = [[value / max(g[-1][-1], 1.0) for value in row] for row in g]
    levels = sorted({value for row in g for value in row})
    target = st.one_of(st.sampled_from(levels), st.floats(0, 1))
    return f, g, draw(st.lists(target, min_size=1, max_size=4))


def assert_exact_within_bounds(f: Table, g: Table, targets: list[float], result: FrontierResult) -> None:
    columns, rows, distinct = len(f), len(f[0]), len(set(targets))
    assert losses(result) == [exhaustive(f, g, target) for target in targets]
    for target, point in zip(targets, result.points, strict=True):
        if point:
            q, p = round(2 * point.tau_text) - 1, round(2 * point.tau_vision) - 1
            assert (point.target, point.loss, point.ratio) == (target, f[q][p], g[q][p])
            assert point.ratio >= target
    assert result.evaluations <= distinct * (columns + rows)
    assert result.f_evaluations <= distinct * columns
    assert result.exhaustive == columns * rows
    assert result.violations == ()
    assert result.complete
    assert result.lower_bounds == tuple(math.inf if loss is None else loss for loss in losses(result))


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


@settings(FAST, max_examples=120)
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


def test_as_many_losses_at_hand_as_targets_or_an_error() -> None:
    with pytest.raises(CalibrationError, match="better_than has 1 losses for 2 targets"):
        search([[1.0]], [[1.0]], [0.5, 0.6], better_than=[0.1])


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


@settings(FAST, max_examples=60)
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


@settings(FAST, max_examples=150)
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


# --- smooth problems: what the search saves ---------------------------------------------------------------------------

TARGETS = [0.5, 0.75, 0.875]


def smooth(share: float, centres: tuple[float, float], slopes: tuple[float, float]) -> tuple[Table, Table]:
    """Quadratic loss; ratio of two logistic score distributions, a text one and a vision one, on 100 x 100 points."""
    x = [i / 99 for i in range(100)]
    text, vision = (
        [1 / (1 + math.exp(-slope * (t - centre))) for t in x] for centre, slope in zip(centres, slopes, strict=True)
    )
    f = [[0.8 * t * t + 0.5 * v * v for v in x] for t in x]
    return f, [[share * a + (1 - share) * b for b in vision] for a in text]


SMOOTH = {
    "mostly vision": smooth(0.2, (0.4, 0.45), (8, 9)),
    "balanced": smooth(0.5, (0.48, 0.45), (8, 8)),
    "mostly text": smooth(0.8, (0.3, 0.6), (6, 10)),
    "flat": smooth(0.4, (0.35, 0.35), (5, 5)),
}


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


# --- interface --------------------------------------------------------------------------------------------------------


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


def test_walk_bound_counts_each_gap_alone() -> None:
    region = Region(5, 4)
    assert region.walk_bound() == 5 + 4 - 1
    region.rule_out(2, 1)
    region.close(2, 2)  # column 2 is settled: columns 0-1 keep rows 2-3, columns 3-4 rows 0-1
    assert region.gaps() == [(0, 1), (3, 4)]
    assert region.walk_bound() == 3 + 3


def test_local_model_recovers_a_plane_and_survives_degenerate_samples() -> None:
    model = LocalModel()
    assert model(3, 3) == 0.0
    for q, p in itertools.product(range(0, 20, 5), repeat=2):
        model.add(q, p, 2.0 * q - p)
    model.add(1, 1, math.inf)
    assert model(7, 8) == pytest.approx(6.0, abs=0.5)
    line = LocalModel()
    for q in range(6):
        line.add(q, 0, 1.0)
    assert line(0, 40) == pytest.approx(1.0, abs=1e-3)
