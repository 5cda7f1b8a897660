"""The demo's four plots, from its report alone.

Matplotlib is optional and imported when a plot is drawn; `Figure` is used directly, so that no window system, backend or
figure list of the caller is touched.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modes_fx.errors import ModesFxError
from modes_fx.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart under the common colour-vision deficiencies; markers differ as well.
_TEXT, _VISION, _OTHER = "#0072B2", "#D55E00", "#595959"
_MODALITIES = (("text", _TEXT, "o"), ("vision", _VISION, "s"))
_MARKERS = "os^Dv*"
_SIZE_IN, _DPI = (7.0, 4.2), 150
_STYLE = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
}
_MOST_PANELS = 4


def save_plots(report: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Draw the demo's plots as PNG files of 1050 x 630 pixels.

    Args:
        report: What the demo measured, as in its ``report.json``.
        folder: Where to write; made if need be.

    Returns:
        Paths of the files by plot: ``alpha``, ``thresholds``, ``skip_by_layer`` and ``quality``.

    Raises:
        ModesFxError: Matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401 - found here although absent, a submodule could still be in sys.modules
        from matplotlib import style
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ModesFxError("Plots need matplotlib: pip install 'modes-fx[viz]'.") from error
    paths = {}
    with style.context(["default", _STYLE]):  # whatever matplotlibrc the user has; restored on the way out
        for name, draw in _PLOTS.items():
            figure = Figure(figsize=_SIZE_IN, dpi=_DPI, layout=ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.09))
            draw(report, figure)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            paths[name] = write_atomically(Path(folder) / f"{name}.png", buffer.getvalue())
    return paths


def _draw_alpha(report: Mapping[str, Any], figure: Figure) -> None:
    axes = figure.subplots()
    columns = [_numbers(row[index] for row in report["alpha"]) for index in range(len(_MODALITIES))]
    positive = [value for column in columns for value in column if value > 0]
    floor = 10 ** (math.floor(math.log10(min(positive))) - 1) if positive else 1e-3
    has_zeros = any(value == 0 for column in columns for value in column)
    for column, (name, colour, marker) in zip(columns, _MODALITIES, strict=True):
        label = "text tokens" if name == "text" else "visual tokens"
        axes.plot([value if value > 0 else math.nan for value in column], color=colour, marker=marker, label=label)
        zeros = [layer for layer, value in enumerate(column) if value == 0]
        axes.plot(zeros, [floor] * len(zeros), marker, color=colour, markerfacecolor="white", markeredgewidth=1.6)
    axes.axhline(1 / len(report["alpha"]), color=_OTHER, linestyle=":", linewidth=1.4, label="if all layers were equal")
    axes.set_yscale("log")
    axes.set_ylabel(r"Layer importance $\alpha$ (share of 1)")
    _layer_axis(axes, report["layers"])
    if has_zeros:
        axes.axhline(floor * 10**0.4, color="#bbbbbb", linewidth=0.8)
        axes.set_ylim(bottom=floor * 10**-0.4)
        ticks = [tick for tick in axes.get_yticks() if tick > floor * 10**0.4 and tick <= max(positive, default=1) * 3]
        axes.set_yticks([floor, *ticks], ["0", *(_power(tick) for tick in ticks)])
        axes.minorticks_off()
        note = "Log scale; hollow marks below the line are exactly 0."
    else:
        note = "Log scale; no layer's importance is 0."
    axes.set_title(note, color=_OTHER, fontsize=10, loc="left")
    figure.legend(loc="outside upper center", ncols=3)


def _draw_thresholds(report: Mapping[str, Any], figure: Figure) -> None:
    from matplotlib.colors import LogNorm

    trials, targets = report["search"].get("trials") or [], report["targets"]
    chosen = {target["gamma"] for target in targets}
    gammas = sorted({trial["gamma"] for trial in trials} | chosen)
    if len(gammas) > _MOST_PANELS:
        gammas = sorted(chosen)
    losses = [trial["kl"] for trial in trials if trial["gamma"] in gammas and trial["kl"] is not None and trial["kl"] > 0]
    highest = max(losses, default=1.0)
    norm = LogNorm(max(min(losses, default=0.1), highest * 1e-5), highest * 1.001, clip=True)
    rows = 1 if len(gammas) <= 2 else 2
    panels = figure.subplots(rows, math.ceil(len(gammas) / rows), squeeze=False)
    for axes, gamma in zip(panels.flat, gammas, strict=False):
        here = [trial for trial in trials if trial["gamma"] == gamma and trial["kl"] is not None]
        points = [target for target in targets if target["gamma"] == gamma]
        tau_text = [trial["tau_text"] for trial in here] + [point["tau"]["text"] for point in points]
        tau_vision = [trial["tau_vision"] for trial in here] + [point["tau"]["vision"] for point in points]
        axes.scatter(
            tau_text[: len(here)],
            tau_vision[: len(here)],
            c=[max(trial["kl"], norm.vmin or 0.0) for trial in here],
            cmap="viridis",
            norm=norm,
            s=22,
            linewidths=0,
        )
        _tau_axis(axes, "x", tau_text)
        _tau_axis(axes, "y", tau_vision)
        axes.minorticks_off()
        for point in points:
            _mark_chosen(axes, point)
        axes.set_title(rf"$\gamma$ = {gamma:g}" + ("" if points else " (not chosen)"))
    for axes in panels.flat[len(gammas) :]:
        axes.set_axis_off()
    figure.supxlabel(r"Threshold $\tau$ of text tokens", fontsize=11)
    figure.supylabel(r"Threshold $\tau$ of visual tokens", fontsize=11)
    if losses:
        from matplotlib.cm import ScalarMappable

        figure.colorbar(ScalarMappable(norm, "viridis"), ax=list(panels.flat), label="KL on calibration data (nats)")


def _mark_chosen(axes: Axes, target: Mapping[str, Any]) -> None:
    from matplotlib.patheffects import withStroke

    point = (target["tau"]["text"], target["tau"]["vision"])
    axes.plot(*point, "o", color=_VISION, markersize=11, markerfacecolor="none", markeredgewidth=2, clip_on=False)
    on_the_right = axes.transAxes.inverted().transform(axes.transData.transform(point))[0] > 0.5
    axes.annotate(
        _percent(target["target"]),
        point,
        (-9 if on_the_right else 9, 0),
        textcoords="offset points",
        ha="right" if on_the_right else "left",
        va="center",
        weight="bold",
        fontsize=10,
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )


def _draw_skip_by_layer(report: Mapping[str, Any], figure: Figure) -> None:
    from matplotlib import colormaps

    panels = figure.subplots(1, 2, sharey=True)
    targets = report["targets"]
    for index, target in enumerate(targets):
        colour = colormaps["viridis"](0.8 * index / max(1, len(targets) - 1))
        for axes, (name, _, _) in zip(panels, _MODALITIES, strict=True):
            label = f"target {_percent(target['target'])}" if name == "text" else None
            ratios = _numbers(target["by_layer"][name])
            axes.plot(ratios, color=colour, marker=_MARKERS[index % len(_MARKERS)], label=label, clip_on=False)
    for axes, title in zip(panels, ("Text tokens", "Visual tokens"), strict=True):
        axes.set_title(title)
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(_per_cent_number)
        _layer_axis(axes, report["layers"])
    panels[0].set_ylabel("Expert calls skipped, test (%)")
    figure.legend(loc="outside upper center", ncols=min(4, len(targets)))


def _draw_quality(report: Mapping[str, Any], figure: Figure) -> None:
    divergence, accuracy = figure.subplots(1, 2)
    ours = [(target["realised"]["test"], target["kl"]["test"], target["accuracy"]) for target in report["targets"]]
    static = [(rule["ratio"], rule["kl"], rule["accuracy"]) for rule in report.get("reduce_k") or []]
    for label, points, colour, marker, line in (
        ("modes-fx", ours, _TEXT, "o", "-"),
        ("reduce-k (static)", static, _VISION, "s", "--"),
    ):
        columns = [_numbers(column) for column in zip(*sorted(points, key=lambda point: point[0] or 0.0), strict=True)]
        ratios, kls, accuracies = columns if columns else ([], [], [])
        divergence.plot(ratios, kls, color=colour, marker=marker, linestyle=line, label=label)
        accuracy.plot(ratios, accuracies, color=colour, marker=marker, linestyle=line)
    accuracy.axhline(report["dense"]["accuracy"], color=_OTHER, linestyle=":", label="dense model")
    divergence.set_yscale("log", nonpositive="mask")
    divergence.set_title("KL from the dense model (nats)")
    accuracy.set_title("Accuracy on the test split (%)")
    accuracy.yaxis.set_major_formatter(_per_cent_number)
    for axes in (divergence, accuracy):
        axes.xaxis.set_major_formatter(_per_cent_number)
        axes.margins(x=0.08)
        axes.set_xlabel("Expert calls skipped, test (%)")
    figure.legend(loc="outside upper center", ncols=3)


def _layer_axis(axes: Axes, paths: Sequence[str]) -> None:
    """Label the x axis with the layers' own numbers, where their paths hold distinct ones."""
    found = [re.search(r"\d+", path) for path in paths]
    numbers = [match.group() for match in found if match]
    names = numbers if len(set(numbers)) == len(paths) else [str(index) for index in range(len(paths))]
    step = math.ceil(len(paths) / 12)
    axes.set_xticks(range(0, len(paths), step), names[::step])
    axes.set_xlim(-0.4, len(paths) - 0.6)
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
    getattr(axes, f"set_{which}ticks")([0.0, *ticks], ["0", *(_power(tick) for tick in ticks)])


def _power(value: float) -> str:
    """Write a tick as 0.02 or, below 0.01, as a power of ten."""
    exponent = math.floor(math.log10(value) + 1e-9)
    if exponent >= -2:
        return f"{value:.2g}"
    mantissa = f"{value / 10.0**exponent:.2g}"
    return ("" if mantissa == "1" else f"{mantissa}·") + f"$10^{{{exponent}}}$"


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"


def _per_cent_number(share: float, _: int) -> str:
    """For an axis whose label has the unit."""
    return f"{100 * share:.4g}"


def _numbers(values: Iterable[float | None]) -> list[float]:
    """What is absent becomes a gap in its line."""
    return [math.nan if value is None else value for value in values]


_PLOTS: dict[str, Callable[[Mapping[str, Any], Figure], None]] = {
    "alpha": _draw_alpha,
    "thresholds": _draw_thresholds,
    "skip_by_layer": _draw_skip_by_layer,
    "quality": _draw_quality,
}
