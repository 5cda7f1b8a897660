"""The engine of the frontier search: which point of the grid to evaluate next, and when it may stop.

It first goes where a local model of f and g predicts the optimum of a target, then closes the gaps on its two sides,
each time with the point predicted to settle most rows or columns. Where the level sets f = best and g = rho have
parted, one point settles many; near the optimum, where they touch, it takes about two a column.

Worst case. A walk from the corner of what is open always settles it in a number of evaluations known in advance
(``Region.walk_bound``), at first columns + rows - 1 a target. A point that may settle nothing is evaluated only if that
walk would still fit in the allowance of columns + rows a target afterwards; each step of the walk shortens it by one.
The losses have an allowance of one a column and target, kept in the same way. On a square grid, a frontier that nothing
prunes takes columns + rows - 1 evaluations at worst, however it is settled. So one is spare, and a search that explores
must first earn its freedom: while little is spare it goes in cautious, growing steps from the corners, and every row or
column that a step settles beyond the first is one more to spare.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from modes_fx.calib.frontier_state import LocalModel, Region
from modes_fx.errors import CalibrationError

_COMFORT = 4  # spare evaluations under which the search earns more before it explores
_LEARNING = range(3, 5)  # evaluations from the other corner, before the model is trusted with what little is spare
_PROBES = 10  # columns of each gap at which the modelled optimum is looked for

ThresholdFunction = Callable[[float, float], float]
OnEvaluation = Callable[[int, int, float, float], None]
Cell = tuple[int, int]


class _StoppedError(Exception):
    """Ends a search before its next evaluation."""


class Search:
    """State of one search: what was evaluated, and the open region of each distinct target.

    Attributes:
        ratios: g by cell, for every evaluated cell.
        losses: f by cell, for those of them at which f was asked too.
        complete: Whether ``run`` went on until no cell was open.
    """

    def __init__(
        self,
        f: ThresholdFunction,
        g: ThresholdFunction,
        taus_text: Sequence[float],
        taus_vision: Sequence[float],
        losses_to_beat: Mapping[float, float],
        g_guess: ThresholdFunction | None,
        on_evaluation: OnEvaluation | None,
        should_stop: Callable[[], bool] | None,
    ) -> None:
        """Start with nothing evaluated; the arguments are ``frontier_search``'s, checked, with a loss to beat a target."""
        self._f, self._g = f, g
        self.taus_text, self.taus_vision = taus_text, taus_vision
        self._on_evaluation, self._should_stop = on_evaluation, should_stop
        self.complete = True
        self.columns, self.rows = len(taus_text), len(taus_vision)
        # Highest first: its frontier is the shortest, and what it settles spares the lower ones their first steps.
        self._targets = sorted(losses_to_beat, reverse=True)
        self._regions = {target: Region(self.columns, self.rows) for target in self._targets}
        self._best = dict(losses_to_beat)
        self.ratios: dict[Cell, float] = {}
        self.losses: dict[Cell, float] = {}
        self._g_model = LocalModel(self._prior(g_guess) if g_guess else None)
        self._f_model = LocalModel()

    def run(self) -> None:
        """Evaluate until no cell is open for any target, or until told to stop."""
        try:
            self._settle_all()
        except _StoppedError:
            self.complete, self._should_stop = False, None
            for target in self._targets:
                self._tighten(target)

    def lower_bound(self, target: float) -> float:
        """Return what the loss of no cell can be below that reaches the target, if f and g are monotone.

        An open cell costs at least what was seen below and to the left of it; -inf where nothing was. A closed one costs at
        least the best loss at hand, which is all that remains once nothing is open.
        """
        return min([self._best[target], *(bound for bound, _ in self._column_bounds(target))])

    def _column_bounds(self, target: float) -> Iterator[tuple[float, int]]:
        """Yield, for each open column, the highest loss seen below and to the left of its lowest open cell."""
        region = self._regions[target]
        highest = [-math.inf] * self.rows  # by row, of the losses seen in this row and column or before
        for q in range(self.columns):
            for p in range(self.rows):
                before = highest[p - 1] if p else -math.inf
                highest[p] = max(highest[p], before, self.losses.get((q, p), -math.inf))
            if region.low[q] < region.high[q]:
                yield highest[region.low[q]], q

    def _tighten(self, target: float) -> None:
        """Evaluate the lower left corner of the columns with the lowest bound: whatever g is there, f bounds them all."""
        bounds = list(self._column_bounds(target))
        weakest = min((bound for bound, _ in bounds), default=math.inf)
        if weakest < self._best[target]:
            columns = [q for bound, q in bounds if bound == weakest]
            cell = columns[0], self._regions[target].low[columns[-1]]
            self._evaluate(*cell)
            self.ask_loss(*cell)

    def _settle_all(self) -> None:
        # The two corners where a walk may start: never wasted, and they show the model both axes.
        for q, p in ((0, self.rows - 1), (self.columns - 1, 0)):
            if any(region.is_open(q, p) for region in self._regions.values()):
                self._evaluate(q, p)
        for target in self._targets:
            region = self._regions[target]
            self._ask_pending(target)
            while gaps := region.gaps():
                self._evaluate(*self._next_cell(target, gaps))
                self._ask_pending(target)

    def ask_loss(self, q: int, p: int) -> None:
        """Evaluate f at a cell where g is known, once, and close what the loss shows to be no better."""
        if (q, p) in self.losses:
            return
        loss = self.losses[q, p] = self._call("f", self._f, q, p)
        self._f_model.add(q, p, loss)
        for target, region in self._regions.items():
            if self.ratios[q, p] >= target and loss < self._best[target]:
                self._best[target] = loss
                for cell, other in self.losses.items():
                    if other >= loss:
                        region.close(*cell)
            elif self._best[target] < math.inf and loss >= self._best[target]:
                region.close(q, p)

    def _evaluate(self, q: int, p: int) -> None:
        """Evaluate g at a cell, and f too where its allowance permits."""
        new = (q, p) not in self.ratios
        if new:
            if self._should_stop and self._should_stop():
                raise _StoppedError
            ratio = self.ratios[q, p] = self._call("g", self._g, q, p)
            self._g_model.add(q, p, ratio)
            for target, region in self._regions.items():
                (region.close if ratio >= target else region.rule_out)(q, p)
        if self._spare_losses() >= 1:
            self.ask_loss(q, p)
        if new and self._on_evaluation:
            left = sum(region.walk_bound() for region in self._regions.values())
            self._on_evaluation(len(self.ratios), left, self.taus_text[q], self.taus_vision[p])

    def _call(self, name: str, function: ThresholdFunction, q: int, p: int) -> float:
        value = float(function(self.taus_text[q], self.taus_vision[p]))
        if math.isnan(value):
            raise CalibrationError(
                f"{name} returned NaN at tau_text={self.taus_text[q]!r}, tau_vision={self.taus_vision[p]!r}: "
                "expected a number. Check the calibration samples (an answer without tokens has no loss and no ratio)."
            )
        return value

    def _prior(self, g_guess: ThresholdFunction) -> Callable[[int, int], float]:
        known: dict[Cell, float] = {}

        def prior(q: int, p: int) -> float:
            if (q, p) not in known:
                value = float(g_guess(self.taus_text[q], self.taus_vision[p]))
                known[q, p] = value if math.isfinite(value) else 0.0
            return known[q, p]

        return prior

    # The allowances. Both are non-negative at the start and no step below makes them negative.

    def _spare(self) -> int:
        """Return how many evaluations may still settle nothing."""
        allowance = len(self._targets) * (self.columns + self.rows)
        return allowance - len(self.ratios) - sum(region.walk_bound() for region in self._regions.values())

    def _spare_losses(self) -> int:
        """Return how many losses may still be asked beyond those that may prove necessary."""
        needed = sum(self._losses_needed(target) for target in self._targets)
        return len(self._targets) * self.columns - len(self.losses) - needed

    def _is_pending(self, target: float, q: int) -> bool:
        """Say whether column ``q`` ends in a minimal feasible point, so far, whose loss is unknown."""
        high = self._regions[target].high
        cell = (q, high[q])
        minimal = q == 0 or high[q - 1] > high[q]
        return minimal and cell not in self.losses and self.ratios.get(cell, -math.inf) >= target

    def _losses_needed(self, target: float) -> int:
        """Return the most minimal feasible points of unknown loss: the longest descending chain of such cells."""
        region = self._regions[target]
        count, previous = 0, self.rows + 1
        for q in range(self.columns):
            top = region.high[q] if self._is_pending(target, q) else region.high[q] - 1
            p = min(previous - 1, top)
            if p >= region.low[q]:
                count, previous = count + 1, p
        return count

    def _ask_pending(self, target: float) -> None:
        """Ask the loss of feasible corners: freely while the allowance lasts, else once nothing can undercut them."""
        region = self._regions[target]
        for q in range(self.columns):
            if not self._is_pending(target, q):
                continue
            p = region.high[q]
            certain = region.low[q] >= p and (q == 0 or region.low[q - 1] > p)
            if certain or self._spare_losses() >= 1:
                self.ask_loss(q, p)

    # Where to look next. Only what is permitted affects the bounds, and nothing here affects the answer.

    def _next_cell(self, target: float, gaps: list[tuple[int, int]]) -> Cell:
        region, spare = self._regions[target], self._spare()
        if spare >= _COMFORT:
            cell = self._modelled_optimum(target, gaps)
            if cell:
                return cell
        if spare < _COMFORT and len(self.ratios) in _LEARNING:
            return gaps[-1][1], region.low[gaps[-1][1]]  # a walk's first step, from its other end
        options = [option for gap in gaps for option in self._settling(target, *gap)]
        if options and (spare >= _COMFORT or len(self.ratios) >= _LEARNING.stop):
            settled, make = max(options, key=lambda option: option[0])
            if spare < _COMFORT:
                # Little to lose: go half as far as predicted, and at first hardly beyond a step of the walk.
                settled = max(1, min(settled // 2, 2**spare))
            cell = make(settled)
            if region.is_open(*cell):
                if spare >= 1 or region.worst_gain(*cell) >= 1:
                    return cell
            elif spare >= 1 and cell not in self.losses and self._spare_losses() >= 1:
                return cell  # known to be infeasible: only its loss is of use
        # The walk's own step, which always gains one.
        return gaps[0][0], region.high[gaps[0][0]] - 1

    def _modelled_optimum(self, target: float, gaps: list[tuple[int, int]]) -> Cell | None:
        """Return the open cell where the model puts the optimum, if it predicts a better loss than the best so far."""
        region = self._regions[target]

        def look(q: int) -> tuple[float, int, int]:
            p = _first(region.low[q], region.high[q], lambda p: self._g_model(q, p) >= target)
            return (self._f_model(q, p) if p < region.high[q] else math.inf, q, p)

        found = (math.inf, 0, 0)
        for first, last in gaps:
            width = last - first + 1
            probes = min(_PROBES, width)
            for i in range(probes):
                found = min(found, look(first + (2 * i + 1) * width // (2 * probes)))
        stride = self.columns // _PROBES
        while stride > 1 and found[0] < math.inf:
            stride //= 2
            for q in (found[1] - stride, found[1] + stride):
                if 0 <= q < self.columns and region.low[q] < region.high[q]:
                    found = min(found, look(q))
        return found[1:] if found[0] < self._best[target] else None

    def _settling(self, target: float, first: int, last: int) -> Iterator[tuple[int, Callable[[int], Cell]]]:
        """Yield, for each way into a gap, the rows or columns it should settle and the cell that settles so many.

        The ways: from the top left corner rightwards (infeasible columns) or downwards (closed rows), and from the
        bottom right corner upwards (infeasible rows) or leftwards (closed columns).
        """
        region, best = self._regions[target], self._best[target]
        top, bottom = region.high[first] - 1, region.low[last]
        f_known = best < math.inf and self._spare_losses() >= 1

        def infeasible(q: int, p: int) -> bool:
            return self._g_model(q, p) < target

        def closes(q: int, p: int) -> bool:
            if (q, p) in self.ratios:
                return f_known and (q, p) not in self.losses and self._f_model(q, p) >= best
            return (region.is_open(q, p) and not infeasible(q, p)) or (f_known and self._f_model(q, p) >= best)

        end = first + 1
        while end <= last and region.high[end] > top:
            end += 1
        if count := _first(first, end, lambda q: not infeasible(q, top)) - first:
            yield count, lambda n: (first + n - 1, top)
        if count := _first(bottom, region.high[last], lambda p: not infeasible(last, p)) - bottom:
            yield count, lambda n: (last, bottom + n - 1)
        if count := top + 1 - _first(bottom, top + 1, lambda p: closes(first, p)):
            yield count, lambda n: (first, top - n + 1)
        if count := last + 1 - _first(first, last + 1, lambda q: closes(q, bottom)):
            yield count, lambda n: (last - n + 1, bottom)


def _first(start: int, stop: int, holds: Callable[[int], bool]) -> int:
    """Return the first index in ``[start, stop)`` at which ``holds``, by bisection; ``stop`` if there is none."""
    while start < stop:
        middle = (start + stop) // 2
        if holds(middle):
            stop = middle
        else:
            start = middle + 1
    return start
