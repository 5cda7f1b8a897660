"""The README's chart and table: what skipping costs in quality and gains in time.

    python -m benchmarks.chart                                                 # draw docs/images/quality-and-speed.json
    python -m benchmarks.chart --demo out/demo/report.json --bench bench.json  # take its figures from new runs first

`make demo` writes the first file, `modes-fx bench --tokens 1 64 2048 --threads 2 --json bench.json` the second.
"""

import argparse
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "docs" / "images"
FIGURES, CHART = FOLDER / "quality-and-speed.json", FOLDER / "quality-and-speed.svg"

QUIET = "#7d8590"  # legible on white and on near-black, as are the others, which are Okabe and Ito's
OURS, OTHER, THIRD = "#0a84d6", "#d55e00", "#009e73"
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "quality-and-speed", "font.size": 9, "lines.linewidth": 2,
    "text.color": QUIET, "axes.labelcolor": QUIET, "axes.edgecolor": QUIET, "xtick.color": QUIET, "ytick.color": QUIET,
    "axes.facecolor": "none", "figure.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def quality(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a demo's report."""
    return {
        "all kept": {"skipped": 0.0, "kl": 0.0, "correct": report["dense"]["accuracy"]},
        "modes-fx": [
            {"skipped": row["realised"]["test"], "kl": row["kl"]["test"], "correct": row["accuracy"]}
            for row in report["targets"]
        ],
        "Reduce-k": [{"skipped": row["ratio"], "kl": row["kl"], "correct": row["accuracy"]} for row in report["reduce_k"]],
    }


def speed(bench: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the times of MoE blocks in a benchmark, against the fastest stock setting."""
    return [
        {"tokens": row["tokens"], "skipped": row["skip"], "of_fastest_stock": row["to_best"]}
        for row in bench["rows"]
        if row["part"] == "block" and row["setting"] == "modes-fx"
    ]


def by_tokens(rows: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    """Return the rows of each number of tokens."""
    return {tokens: list(mine) for tokens, mine in groupby(rows, key=lambda row: row["tokens"])}


def table(figures: Mapping[str, Any]) -> str:
    """Return what skipping costs and gains as a table in markdown, a column for each skip ratio."""
    kept, ours, theirs = (figures["quality"][name] for name in ("all kept", "modes-fx", "Reduce-k"))
    columns = [kept, *ours]
    lines = [
        ["skipped", *(f"{row['skipped']:.0%}" for row in columns)],
        ["---"] * (1 + len(columns)),
        ["embedded model: questions answered right", *(f"{row['correct']:.1%}" for row in columns)],
        ["embedded model: KL from the unskipped, nats", *(_short(row["kl"]) for row in columns)],
        [
            "Reduce-k there, at " + ", ".join(f"{row['skipped']:.1%}" for row in theirs),
            "",
            *(_short(row["kl"]) for row in theirs),
        ],
    ]
    for tokens, rows in by_tokens(figures["speed"]["rows"]).items():
        cells = [""] * len(columns)
        for row in rows:
            cells[_column(columns, row["skipped"])] = f"{row['of_fastest_stock']:.2f}"
        lines.append([f"CPU: MoE block, {tokens:,} token{'s' * (tokens > 1)}", *cells])
    lines.append(["NVIDIA GPU", "not measured yet", *[""] * len(ours)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _column(columns: Sequence[Mapping[str, Any]], skipped: float) -> int:
    for index, column in enumerate(columns):
        if abs(column["skipped"] - skipped) < 0.015:
            return index
    raise SystemExit(f"No column of the table is at {skipped:.1%} skipped: run the benchmark with --skip 0 0.5 0.88.")


def chart(figures: Mapping[str, Any]) -> str:
    """Return the chart as SVG."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(8.4, 3.1), layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_quality(left, figures["quality"])
        _draw_speed(right, figures["speed"]["rows"])
        for axes in (left, right):
            axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f}%")
            axes.set_xlabel("expert calls skipped")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    return buffer.getvalue().replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'") + mark(figures) + "\n"


def mark(figures: Mapping[str, Any]) -> str:
    """Return the comment that says which figures a chart was drawn of, whatever matplotlib makes of them."""
    return f"<!-- {FIGURES.name}: {hashlib.sha256(json.dumps(figures).encode()).hexdigest()} -->"


def _draw_quality(axes: Any, figures: Mapping[str, Any]) -> None:
    axes.set_title("Change of the answers: KL, nats, log scale", loc="left", fontsize=9.5)
    for name, label, colour in (("Reduce-k", "each token's largest weights", OTHER), ("modes-fx", "modes-fx", OURS)):
        rows = figures[name]
        axes.plot([row["skipped"] for row in rows], [row["kl"] for row in rows], marker="o", color=colour)
        first = rows[0]
        axes.annotate(label, (first["skipped"], first["kl"]), (-6, 22), textcoords="offset points", color=colour)
        for row in rows:
            place, below = (row["skipped"], row["kl"]), (0, -14)
            axes.annotate(f"{row['correct']:.1%}", place, below, textcoords="offset points", fontsize=7.5, ha="center")
    axes.set_yscale("log")
    axes.set_ylim(1.5e-6, 0.04)
    axes.set_xlim(0.45, 0.93)
    axes.minorticks_off()
    said = f"Numbers: right answers, {figures['all kept']['correct']:.1%} with nothing skipped"
    axes.text(0.02, 0.95, said, transform=axes.transAxes, fontsize=7.5)


def _draw_speed(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title("Time of an MoE block, fastest stock setting = 1", loc="left", fontsize=9.5)
    axes.axhline(1, color=QUIET, linewidth=1, linestyle=(0, (1, 2)))
    for (tokens, mine), colour in zip(by_tokens(rows).items(), (OURS, THIRD, OTHER), strict=True):
        ratios, times = ([row[name] for row in mine] for name in ("skipped", "of_fastest_stock"))
        axes.plot(ratios, times, marker="o", color=colour, label=f"{tokens:,} token{'s' * (tokens > 1)}")
    axes.set_ylim(0, 1.1)
    axes.legend(frameon=False, labelcolor=QUIET, loc="lower left")


def _short(value: float) -> str:
    """Write 5.8e-5, or 0."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def main() -> None:
    """Take figures from new runs, if any are named, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="report.json of a demo")
    parser.add_argument("--bench", type=Path, help="JSON of a benchmark")
    given = parser.parse_args()
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    if given.demo:
        figures["quality"] |= quality(json.loads(given.demo.read_text(encoding="utf-8")))
    if given.bench:
        found = json.loads(given.bench.read_text(encoding="utf-8"))
        figures["speed"] |= {"machine": f"{found['options']['threads']} threads of {found['cpu']}", "rows": speed(found)}
    FIGURES.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    CHART.write_text(chart(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
