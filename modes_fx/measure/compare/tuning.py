"""Find the scale of a rule at which it skips what it should; no model here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from modes_fx.calib.objective import Evaluation

HUGE = 1e9  # finite: a rule's infinite bound skips all, which no finite one may do
_STEPS = 40


@dataclass(frozen=True)
class Tuned:
    """A scale, and what it does on calibration data.

    Attributes:
        scale: The scale.
        evaluation: Measured under it.
        reached: Whether the target was reached within the tolerance.
    """

    scale: float
    evaluation: Evaluation
    reached: bool


class Tuner:
    """Reaches skip ratios by one scale; measurements serve every target.

    Args:
        measure: Measures a scale >= 0; a larger one skips at least as much, or nearly (earlier skips change later routing).
        tolerance: How far above its target a skip ratio may be.
        scales: The only scales there are, ascending; None: any.
        largest: No scale is larger.
    """

    def __init__(
        self,
        measure: Callable[[float], Evaluation],
        *,
        tolerance: float = 0.005,
        scales: Sequence[float] | None = None,
        largest: float = HUGE,
    ) -> None:
        self._measure, self._tolerance, self._scales, self._largest = measure, tolerance, scales, largest
        self.measured: dict[float, Evaluation] = {}

    def reach(self, target: float) -> Tuned | None:
        """Return the measured scale of the least skip ratio that is at least the target; None if no scale reaches it."""
        if self._scales is not None:
            for scale in self._scales:
                if self._ratio(scale) >= target:
                    break
        elif self._ratio(self._largest) >= target:
            self._bisect(target)
        enough = [(found.skip_ratio, scale) for scale, found in self.measured.items() if found.skip_ratio >= target]
        if not enough:
            return None
        ratio, scale = min(enough)
        return Tuned(scale, self.measured[scale], ratio <= target + self._tolerance)

    @property
    def largest_ratio(self) -> float:
        """The largest skip ratio measured."""
        return max((found.skip_ratio for found in self.measured.values()), default=0.0)

    def _ratio(self, scale: float) -> float:
        if scale not in self.measured:
            self.measured[scale] = self._measure(scale)
        return self.measured[scale].skip_ratio

    def _bisect(self, target: float) -> None:
        high = 1.0
        while self._ratio(high) < target and high < self._largest:
            high = min(2 * high, self._largest)
        for step in range(_STEPS):
            above = [scale for scale, found in self.measured.items() if found.skip_ratio >= target]
            high = min(above)
            low = max((scale for scale in self.measured if scale < high), default=0.0)
            if self._ratio(high) <= target + self._tolerance or high - low <= 1e-6 * high:
                return
            below = self.measured[low].skip_ratio if low in self.measured else 0.0
            aim = target + self._tolerance / 2
            share = (aim - below) / max(self._ratio(high) - below, math.ulp(1.0))
            # The line between the ends is a good guess; every other step halves, should the ratio rise in jumps.
            self._ratio(low + (high - low) * (min(max(share, 0.02), 0.98) if step % 2 == 0 else 0.5))
