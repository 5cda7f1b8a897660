"""What was measured of a model's layers and of thresholds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from modes_fx.measure.page.figures import ACCENT, INK, LINE, PAPER, QUIET, SIZE_IN, SMALL_IN, TEXT, VISION, Drawing
from modes_fx.measure.page.markup import power, short, target

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Trial = Mapping[str, float]  # gamma, tau_text, tau_vision, kl, ratio
_MODALITIES = (("text", TEXT, "o"), ("vision", VISION, "s"))
_MOST_PANELS = 4
_MOST_NUMBERS = 16  # layers up to which a cell of the heat map has room for its number


def alpha(values: Sequence[Sequence[float]], layers: Sequence[str]) -> Drawing:
    """Return the importance of each layer for (text, vision) tokens, on a log scale; what is 0 stands on the axis."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        positive = [value for row in values for value in row if value > 0]
        floor = 10 ** (math.floor(math.log10(min(positive, default=0.1))) - 0.5)
        axes.axhline(1 / len(values), color=QUIET, linestyle=(0, (1, 2)), linewidth=0.9)
        for index, (name, colour, marker) in enumerate(_MODALITIES):
            column = [row[index] for row in values]
            axes.plot([max(value, floor) for value in column], color=colour, marker=marker, label=name, clip_on=False)
            zeros = [layer for layer, value in enumerate(column) if value == 0]
            axes.plot(zeros, [floor] * len(zeros), marker, color=colour, markerfacecolor=PAPER, clip_on=False, zorder=3)
        axes.set_yscale("log")
        axes.set_ylim(bottom=floor)
        axes.yaxis.set_major_formatter(lambda value, _: f"10{power(round(math.log10(value)))}" if value < 1 else "1")
        axes.minorticks_off()
        _layer_axis(axes, layers)
        figure.legend(loc="outside upper left", ncols=2, frameon=False, labelcolor=QUIET)

    caption = "How much answers change when a layer's experts are left out; each modality sums to 1. Dotted: all layers alike."
    if any(value == 0 for row in values for value in row):
        caption += " Hollow: exactly 0."
    return Drawing("Importance α of each layer, log scale", draw, caption)


def skipping(by_layer: Mapping[str, Sequence[float | None]], layers: Sequence[str], caption: str = "") -> Drawing:
    """Return the skip ratio of each layer as a heat map, a row for each name."""

    def draw(figure: Figure) -> None:
        from matplotlib.patches import Rectangle

        axes = figure.subplots()
        for row, ratios in enumerate(by_layer.values()):
            for layer, ratio in enumerate(ratios):
                alpha = 0.0 if ratio is None else 0.04 + 0.96 * ratio
                corner = (layer - 0.48, row - 0.47)
                axes.add_patch(Rectangle(corner, 0.96, 0.94, facecolor=ACCENT, alpha=alpha, linewidth=0))
                if len(layers) <= _MOST_NUMBERS:
                    said = "–" if ratio is None else f"{100 * ratio:.0f}"
                    colour = PAPER if ratio is not None and ratio > 0.5 else INK
                    axes.text(layer, row, said, ha="center", va="center", color=colour)
        _layer_axis(axes, layers)
        axes.set_yticks(range(len(by_layer)), list(by_layer))
        axes.set_ylim(len(by_layer) - 0.5, -0.5)
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    size = (SIZE_IN[0], 0.75 + 0.6 * len(by_layer))
    return Drawing("Expert calls skipped in each layer, %", draw, caption, size)


def frontier(trials: Sequence[Trial], chosen: Sequence[Trial]) -> Drawing:
    """Return the loss of all trials over their skip ratio, and the line of those that no other beats in both."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        known = [trial for trial in trials if trial["kl"] > 0]
        best = unbeaten(known)
        ratios, losses = ([trial[name] for trial in known] for name in ("ratio", "kl"))
        axes.plot(ratios, losses, "o", color=QUIET, alpha=0.35, markersize=3, markeredgewidth=0)
        axes.plot([t["ratio"] for t in best], [t["kl"] for t in best], color=ACCENT, drawstyle="steps-pre")
        axes.plot([t["ratio"] for t in best], [t["kl"] for t in best], "o", color=ACCENT, markersize=3.5)
        for point in chosen:
            axes.axvline(point["target"], color=LINE, linewidth=0.9, linestyle=(0, (2, 2)), zorder=0)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"10{power(round(math.log10(value)))}")
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g}%")
        axes.set_xlabel("expert calls skipped")

    caption = f"All {len(trials)} pairs measured on calibration data; the line joins those that no other beats in both."
    return Drawing("Search: KL of each pair of thresholds, nats, log scale", draw, caption)


def planes(trials: Sequence[Trial], chosen: Sequence[Trial]) -> list[Drawing]:
    """Return the plane of thresholds for each exponent gamma: trials by their loss, the frontier, and the points chosen.

    Args:
        trials: All that was measured.
        chosen: ``target``, ``gamma``, ``tau_text`` and ``tau_vision`` of each point in use.
    """
    used = {point["gamma"] for point in chosen}
    gammas = sorted({trial["gamma"] for trial in trials} | used)
    gammas = gammas if len(gammas) <= _MOST_PANELS else sorted(used)
    ends = _ends(trials)
    best = {id(trial) for trial in unbeaten(trials)}
    return [
        Drawing(
            f"γ = {gamma:g}" + ("" if gamma in used else ", not chosen"),
            _plane([trial for trial in trials if trial["gamma"] == gamma], best, ends,
                   [point for point in chosen if point["gamma"] == gamma]),
            size_in=SMALL_IN,
        )
        for gamma in gammas
    ]  # fmt: skip


def plane_key(trials: Sequence[Trial]) -> str:
    """Say what the planes' colours mean, as HTML."""
    low, high = _ends(trials)
    return (
        f'<p class="scale"><span>KL {short(low)}</span><i class="viridis"></i><span>{short(high)} nats</span></p>'
        '<p class="quiet">Each dot is a pair of thresholds that was measured; large dots are on the frontier, rings mark the '
        "points in use for the targets.</p>"
    )


def unbeaten(trials: Iterable[Trial]) -> list[Trial]:
    """Return the trials that no other beats in both skip ratio and loss, by ascending ratio."""
    best: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (-trial["ratio"], trial["kl"])):
        if not best or trial["kl"] < best[-1]["kl"]:
            best.append(trial)
    return best[::-1]


def _ends(trials: Sequence[Trial]) -> tuple[float, float]:
    """Return the losses that colours go from and to: five powers of ten at most."""
    losses = [trial["kl"] for trial in trials if trial["kl"] > 0]
    highest = max(losses, default=1.0)
    return max(min(losses, default=1e-3), highest * 1e-5), highest


def _plane(
    trials: Sequence[Trial], best: set[int], ends: tuple[float, float], chosen: Sequence[Trial]
) -> Callable[[Figure], None]:
    def draw(figure: Figure) -> None:
        from matplotlib.colors import LogNorm

        axes = figure.subplots()
        norm = LogNorm(ends[0], ends[1] * 1.001, clip=True)
        axes.scatter(
            [trial["tau_text"] for trial in trials],
            [trial["tau_vision"] for trial in trials],
            c=[max(trial["kl"], ends[0]) for trial in trials],
            s=[46 if id(trial) in best else 14 for trial in trials],
            edgecolors=[INK if id(trial) in best else "none" for trial in trials],
            cmap="viridis", norm=norm, linewidths=0.8, clip_on=False, zorder=3,
        )  # fmt: skip
        for which in ("text", "vision"):
            values = [point[f"tau_{which}"] for point in (*trials, *chosen)]
            _tau_axis(axes, "x" if which == "text" else "y", values)
        axes.minorticks_off()
        for point in chosen:
            _ring(axes, point)
        axes.set_xlabel("τ of text tokens")
        axes.set_ylabel("τ of visual tokens")

    return draw


def _ring(axes: Axes, point: Trial) -> None:
    place = (point["tau_text"], point["tau_vision"])
    axes.plot(*place, "o", color=VISION, markersize=9, markerfacecolor="none", markeredgewidth=1.8, clip_on=False, zorder=4)
    right = axes.transAxes.inverted().transform(axes.transData.transform(place))[0] > 0.5
    axes.annotate(
        target(point["target"]), place, (-8 if right else 8, 0), textcoords="offset points",
        ha="right" if right else "left", va="center", weight="bold", zorder=5,
        bbox={"boxstyle": "square,pad=0.1", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.75},
    )  # fmt: skip


def _layer_axis(axes: Axes, paths: Sequence[str]) -> None:
    """Label the x axis with the layers' own numbers, where their paths hold distinct ones."""
    found = [re.search(r"\d+", path) for path in paths]
    numbers = [match.group() for match in found if match]
    names = numbers if len(set(numbers)) == len(paths) else [str(index) for index in range(len(paths))]
    step = math.ceil(len(paths) / 12)
    axes.set_xticks(range(0, len(paths), step), names[::step])
    axes.set_xlim(-0.5, len(paths) - 0.5)
    axes.set_xlabel("MoE layer")


def _tau_axis(axes: Axes, which: str, values: Sequence[float]) -> None:
    """Make the x or y axis logarithmic down to the smallest positive threshold, and linear from there to 0."""
    positive = [value for value in values if value > 0]
    if not positive:
        return
    low, high = min(positive), max(positive)
    getattr(axes, f"set_{which}scale")("symlog", linthresh=low, linscale=0.35)
    getattr(axes, f"set_{which}lim")(-0.45 * low, high * 1.5)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if len(exponents) > 3 else (1, 2, 5)
    ticks = [step * 10.0**exponent for exponent in exponents for step in steps if low <= step * 10.0**exponent <= high]
    ticks = ticks[:: math.ceil(len(ticks) / 4)] if ticks else [high]
    getattr(axes, f"set_{which}ticks")([0.0, *ticks], ["0", *map(_tick, ticks)])


def _tick(value: float) -> str:
    """Write 0.02 or, below 0.01, a power of ten."""
    exponent = math.floor(math.log10(value) + 1e-9)
    if exponent >= -2:
        return f"{value:.2g}"
    mantissa = f"{value / 10.0**exponent:.2g}"
    return ("" if mantissa == "1" else f"{mantissa}·") + f"10{power(exponent)}"
