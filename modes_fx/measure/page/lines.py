"""Lines over the skip ratio, one a rule, each named where it ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from modes_fx.measure.page.figures import ACCENT, COLOURS, INK, QUIET
from modes_fx.measure.page.markup import power

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINES, _MARKERS = ("-", (0, (4, 2)), (0, (1, 1.5))), "osDv^P"
_GAP = 0.062  # between labels, of the axes' height
_FIGURES_OF_LOSS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
_STRAIGHT = 0.02  # loss up to which the axis of what is retained is linear


@dataclass(frozen=True)
class Line:
    """One rule's measurements.

    Attributes:
        name: Shown at its end.
        x: Skip ratios, ascending.
        y: What was measured there; NaN is a gap.
        between: Lower and upper ends of the intervals of ``y``; () for none.
        single: (x, y) of each of several models that ``y`` is the mean of.
        own: Whether it stands out.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    between: Sequence[tuple[float, float]] = ()
    single: Sequence[tuple[float, float]] = ()
    own: bool = False


Scale = Callable[["Axes", Sequence[Line]], None]


def draw_lines(lines: Sequence[Line], scale: Scale, level: tuple[float, str] | None = None) -> Callable[[Figure], None]:
    """Return what draws lines.

    Args:
        lines: At least one.
        scale: Sets the y axis up: ``logarithmic``, ``retained`` or ``factor``.
        level: A value of y to mark, and its name.
    """

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots()
        styles = _styles(lines)
        if level is not None:
            axes.axhline(level[0], color=QUIET, linewidth=0.9, linestyle=(0, (1, 2)))
        for line in sorted(lines, key=lambda line: line.own):
            colour, dash, marker = styles[line.name]
            width, size = (2.4, 5.5) if line.own else (1.4, 4)
            axes.plot(line.x, line.y, color=colour, linestyle=dash, marker=marker, linewidth=width, markersize=size)
            if line.between and line.own:
                low, high = zip(*line.between, strict=True)
                axes.fill_between(line.x, low, high, color=colour, alpha=0.16, linewidth=0)
            elif line.between:
                low, high = zip(*line.between, strict=True)
                axes.vlines(line.x, low, high, color=colour, alpha=0.4, linewidth=0.9)
            if line.single:
                axes.plot(*zip(*line.single, strict=True), ".", color=colour, alpha=0.35, markersize=3)
        scale(axes, lines)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g}%")
        axes.set_xlabel("expert calls skipped")
        axes.margins(x=0.04)
        _name_ends(axes, lines, styles)
        if level is not None:
            axes.annotate(
                level[1], (1, level[0]), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                color=QUIET, fontsize=7.5, ha="right",
            )  # fmt: skip

    return draw


def logarithmic(axes: Axes, lines: Sequence[Line]) -> None:
    """A y axis of powers of ten."""
    values = [y for line in lines for y in line.y if y > 0]
    axes.set_yscale("log", nonpositive="mask")
    if values:
        low, high = min(values) / 1.6, max(values) * 1.6
        if math.floor(math.log10(high)) - math.ceil(math.log10(low)) < 1:  # at least two powers of ten to read it by
            low, high = 10.0 ** math.floor(math.log10(low)) / 1.1, 10.0 ** math.ceil(math.log10(high)) * 1.1
        axes.set_ylim(low, high)
    axes.yaxis.set_major_formatter(lambda value, _: f"10{power(round(math.log10(value)))}")
    axes.minorticks_off()


def retained(axes: Axes, lines: Sequence[Line]) -> None:
    """A y axis of shares that is stretched near 1, where good rules are close together."""
    axes.set_yscale("function", functions=(lambda y: -_bend(1 - y), lambda bent: 1 - _unbend(-bent)))
    values = [y for line in lines for y in (*line.y, *(low for low, _ in line.between if line.own)) if not math.isnan(y)]
    low, high = min(values, default=0.9), max([1.0, *values])
    axes.set_ylim(1 - _unbend(_bend(1 - low) + 0.25), high + 0.006)
    ticks = [1 - loss for loss in _FIGURES_OF_LOSS if 1 - loss >= axes.get_ylim()[0]]
    axes.set_yticks(ticks, [f"{100 * tick:.0f}%" for tick in ticks])


def factor(axes: Axes, lines: Sequence[Line]) -> None:
    """A y axis of factors."""
    ends = [end for line in lines for pair in line.between for end in pair]
    values = [y for y in (*ends, *(y for line in lines for y in line.y)) if not math.isnan(y)]
    axes.set_ylim(min([0.95, *values]) - 0.05, max([1.05, *values]) + 0.1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}×")


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move numbers in [0, 1] apart, as little as a pass up and one down can, so that neighbours differ by ``gap``."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = [places[index] for index in order]
    for index in range(1, len(moved)):
        moved[index] = max(moved[index], moved[index - 1] + gap)
    limit = 1.0
    for index in range(len(moved) - 1, -1, -1):
        moved[index] = min(moved[index], limit)
        limit = moved[index] - gap
    found = [0.0] * len(places)
    for index, place in zip(order, moved, strict=True):
        found[index] = place
    return found


def _name_ends(axes: Axes, lines: Sequence[Line], styles: Mapping[str, tuple[str, object, str]]) -> None:
    ends = []
    for line in lines:
        seen = [(x, y) for x, y in zip(line.x, line.y, strict=True) if not math.isnan(y)]
        if seen:
            ends.append((line, seen[-1]))
    to_axes = axes.transData + axes.transAxes.inverted()
    places = spread([min(max(float(to_axes.transform(end)[1]), 0.0), 1.0) for _, end in ends], _GAP)
    for (line, end), place in zip(ends, places, strict=True):
        colour = styles[line.name][0]
        axes.annotate(
            line.name, end, (1.07, place), xycoords="data", textcoords="axes fraction", va="center",
            color=INK if line.own else QUIET, weight="bold" if line.own else "normal", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "alpha": 0.6, "shrinkA": 1, "shrinkB": 4,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def _styles(lines: Sequence[Line]) -> dict[str, tuple[str, object, str]]:
    """Return colour, dashes and marker of each line, such that no two share all, by its place among the others."""
    looks = [(colour, dash) for dash, colour in product(_LINES, COLOURS)]
    others = [line.name for line in lines if not line.own]
    found: dict[str, tuple[str, object, str]] = {line.name: (ACCENT, "-", "o") for line in lines if line.own}
    for index, name in enumerate(others):
        found[name] = (*looks[index % len(looks)], _MARKERS[index % len(_MARKERS)])
    return found


def _bend(loss: Any) -> Any:
    straight = np.asarray(loss) / _STRAIGHT
    size = np.abs(straight)
    return np.sign(straight) * np.where(size <= 1, size, 1 + np.log(np.maximum(size, 1)))


def _unbend(bent: Any) -> Any:
    size = np.abs(bent)
    return _STRAIGHT * np.sign(bent) * np.where(size <= 1, size, np.exp(np.maximum(size, 1) - 1))
