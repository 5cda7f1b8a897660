"""What a frontier search knows of its grid: the open cells of one target, and a local model of f or g.

A cell ``(q, p)`` is a pair of indices into the text and the vision thresholds. For one target rho, a cell is

    infeasible   g(q', p') < rho was seen for some q' >= q, p' >= p
    closed       at some q' <= q, p' <= p, g >= rho or f >= best was seen: nothing better lies strictly beyond
    open         neither; only an open cell can still change the answer

Both staircases are kept by column, so a ``Region`` is two lists of integers.
"""

import heapq
import math
from collections.abc import Callable

_NEIGHBOURS = 12  # samples in one local fit: twice the six terms of a quadratic in two variables


class Region:
    """Open cells of one target: ``low[q] <= p < high[q]``, both non-increasing in ``q``."""

    def __init__(self, columns: int, rows: int) -> None:
        """Start with every cell open.

        Args:
            columns: Number of text thresholds.
            rows: Number of vision thresholds.
        """
        self.columns = columns
        self.rows = rows
        self.low = [0] * columns
        self.high = [rows] * columns

    def rule_out(self, q: int, p: int) -> None:
        """Record that ``(q, p)``, and with it every cell below and to the left, is infeasible."""
        while q >= 0 and self.low[q] <= p:
            self.low[q] = p + 1
            q -= 1

    def close(self, q: int, p: int) -> None:
        """Record that no cell above or to the right of ``(q, p)`` can beat what is known."""
        while q < self.columns and self.high[q] > p:
            self.high[q] = p
            q += 1

    def is_open(self, q: int, p: int) -> bool:
        """Say whether ``(q, p)`` can still change the answer."""
        return self.low[q] <= p < self.high[q]

    def gaps(self) -> list[tuple[int, int]]:
        """Return the connected runs of open columns, as inclusive ``(first, last)`` pairs, left to right."""
        runs: list[tuple[int, int]] = []
        last = -1
        for q in range(self.columns):
            if self.low[q] < self.high[q]:
                if last >= 0 and self.high[q] > self.low[last]:
                    runs[-1] = (runs[-1][0], q)
                else:
                    runs.append((q, q))
                last = q
        return runs

    def walk_bound(self) -> int:
        """Return the most evaluations of g with which a walk from a gap's corner settles all that is open.

        Each step of a walk from the top left cell of a gap retires that cell's column (infeasible) or its row
        (feasible) and the last one retires both, so a gap of c columns and r rows takes at most c + r - 1. No
        evaluation anywhere can raise the bound: it removes rows and columns, or splits a gap, which removes one more.
        """
        return sum((last - first) + (self.high[first] - self.low[last]) for first, last in self.gaps())

    def worst_gain(self, q: int, p: int) -> int:
        """Return by how much ``walk_bound`` falls at least, whatever g at ``(q, p)`` turns out to be."""
        before = self.walk_bound()
        after = []
        for update in (Region.rule_out, Region.close):
            trial = Region(self.columns, self.rows)
            trial.low, trial.high = self.low[:], self.high[:]
            update(trial, q, p)
            after.append(trial.walk_bound())
        return before - max(after)


class LocalModel:
    """Predicts f or g from the samples near a cell: a weighted least-squares quadratic, plus an optional prior.

    It only ever chooses where to look, so nothing depends on its being right.
    """

    def __init__(self, prior: Callable[[int, int], float] | None = None) -> None:
        """Start without samples.

        Args:
            prior: Guess of the value at a cell; the fit then models what the guess gets wrong.
        """
        self._prior = prior
        self._samples: list[tuple[int, int, float]] = []

    def add(self, q: int, p: int, value: float) -> None:
        """Add the value seen at ``(q, p)``; infinite ones are left out, for no fit survives them."""
        residual = value - (self._prior(q, p) if self._prior else 0.0)
        if math.isfinite(residual):
            self._samples.append((q, p, residual))

    def __call__(self, q: int, p: int) -> float:
        """Predict the value at ``(q, p)``; 0 (or the prior) before the first sample."""
        base = self._prior(q, p) if self._prior else 0.0
        if not self._samples:
            return base
        near = heapq.nsmallest(
            _NEIGHBOURS, [((x - q) ** 2 + (y - p) ** 2, x - q, y - p, value) for x, y, value in self._samples]
        )
        return base + (near[0][3] if near[0][0] == 0 else _fit_at_origin(near))


def _fit_at_origin(near: list[tuple[int, int, int, float]]) -> float:
    """Fit constant, plane or quadratic (by sample count) to ``(distance^2, x, y, value)``; return it at the origin."""
    terms = 6 if len(near) >= 9 else 3 if len(near) >= 3 else 1
    scale = math.sqrt(near[-1][0])
    system = [[0.0] * (terms + 1) for _ in range(terms)]
    for distance, x, y, value in near:
        u, v = x / scale, y / scale
        basis = (1.0, u, v, u * u, u * v, v * v)[:terms]
        weight = 1.0 / (distance / scale**2 + 1e-3)
        for i, left in enumerate(basis):
            row = system[i]
            for j, right in enumerate(basis):
                row[j] += weight * left * right
            row[terms] += weight * left * value
    # A light ridge on all but the constant: samples on one line leave the other slopes undetermined.
    for i in range(1, terms):
        system[i][i] += 1e-4 if i < 3 else 1e-2
    # Only the constant is wanted, so eliminate upwards and divide once.
    for pivot in range(terms - 1, 0, -1):
        for i in range(pivot):
            factor = system[i][pivot] / system[pivot][pivot]
            for j in (*range(pivot), terms):
                system[i][j] -= factor * system[pivot][j]
    # Rounding can cancel the pivot when values span many orders of magnitude: the nearest sample is as good a guess.
    return system[0][terms] / system[0][0] if system[0][0] else near[0][3]
