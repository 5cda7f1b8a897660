"""What lmms-eval wrote, as scores in the paper's units, and the table of both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from tabulate import tabulate

from published.figures import Benchmark, Published, Scores, retained

MISSING = "-"


@dataclass(frozen=True)
class Run:
    """One benchmark, evaluated under one setting.

    Attributes:
        score: In the paper's units.
        skipped: Share of expert calls that was skipped, in [0, 1], as measured; 0 for the stock model.
    """

    score: float
    skipped: float


def results_in(folder: Path) -> Path | None:
    """Return the newest file of results that lmms-eval left in a folder, None where no run came to its end."""
    return max(folder.rglob("*_results.json"), default=None, key=lambda file: file.stat().st_mtime)


def read(file: Path, benchmark: Benchmark) -> Run:
    """Read a file of results.

    Raises:
        ValueError: It lacks the benchmark's score, as it does where the scoring failed.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    scores = [_score(content["results"][task], benchmark, file) for task in content["n-samples"]]
    return Run(benchmark.scale * mean(scores), (content.get("throughput") or {}).get("avg_skip_ratio", 0.0))


def _score(result: Mapping[str, Any], benchmark: Benchmark, file: Path) -> float:
    values = {key.partition(",")[0]: value for key, value in result.items()}
    found = [values.get(metric) for metric in benchmark.metrics]
    if not all(isinstance(value, (int, float)) for value in found):
        raise ValueError(
            f"{file} has no score of {benchmark.name}, but {found}. See log.txt one folder up; remove this file to try again."
        )
    return float(sum(found))


def table(
    published: Published, benchmarks: Sequence[Benchmark], stock: Mapping[str, Run], ours: Mapping[float, Mapping[str, Run]]
) -> str:
    """Return the paper's table beside ours, in markdown.

    Args:
        published: The paper's figures; one that it lacks is shown as ``-``.
        benchmarks: Those that were run; means are over these alone, the paper's too.
        stock: Ours of the unskipped model, by benchmark.
        ours: The same by target skip ratio.
    """
    columns: list[tuple[str, Scores, float | None]] = []  # heading, scores, skipped
    columns.append(("paper", published.default, None))
    columns.append(("stock", _scores_of(stock), None))
    for target, runs in ours.items():
        columns.append(
            (f"paper {target:.0%}", published.skipped.get(target, {}), target if target in published.skipped else None)
        )
        columns.append((f"ours {target:.0%}", _scores_of(runs), mean(run.skipped for run in runs.values())))
    rows = [[each.name, *(_cell(scores.get(each.name)) for _, scores, _ in columns)] for each in benchmarks]
    kept = [_retained(scores, columns[index % 2][1], benchmarks) for index, (_, scores, _) in enumerate(columns)]
    rows.append(["retained, %", *map(_cell, kept)])
    rows.append(["skipped, %", *(_cell(None if skipped is None else 100 * skipped, 1) for _, _, skipped in columns)])
    headings = ["", *(heading for heading, _, _ in columns)]
    return tabulate(rows, headings, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * len(columns)))


def _scores_of(runs: Mapping[str, Run]) -> Scores:
    return {name: run.score for name, run in runs.items()}


def _retained(scores: Scores, default: Scores, benchmarks: Sequence[Benchmark]) -> float | None:
    """Return what is retained over all benchmarks, None where a score is missing or the unskipped model has none right."""
    names = [benchmark.name for benchmark in benchmarks]
    if not all(name in scores and default.get(name) for name in names):
        return None
    return retained({name: scores[name] for name in names}, default)


def _cell(value: float | None, digits: int = 2) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"
