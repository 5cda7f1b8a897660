"""Problems for the frontier search, and two independent oracles: exhaustive search and the published two-pointer walk."""

import itertools
import math
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st

from modes_fx.calib.frontier import FrontierResult, frontier_search

Table = list[list[float]]  # [text index][vision index]
FAST = settings(max_examples=40)


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
