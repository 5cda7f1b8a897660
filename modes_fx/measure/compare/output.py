"""A comparison as files: JSON with everything, CSV with one line a rule, target and model."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modes_fx.files import strict_json
from modes_fx.files.writing import in_any_case, write_atomically
from modes_fx.measure.compare.page import write_comparison_page
from modes_fx.measure.compare.rows import Row, mean_row
from modes_fx.measure.compare.run import Comparison
from modes_fx.measure.page.closeup import Closeup


def mean_rows(comparisons: Mapping[str, Comparison]) -> tuple[Row, ...]:
    """Return the rows of one model, or their means over several."""
    return tuple(mean_row(rows) for rows in zip(*(each.rows for each in comparisons.values()), strict=True))


def write(
    comparisons: Mapping[str, Comparison], settings: Mapping[str, Any], out: Path, closeup: Closeup | None = None
) -> tuple[Path, Path, Path]:
    """Write ``compare.html``, ``compare.json`` and ``compare.csv``.

    Args:
        comparisons: By the model's name; all of the same rules and targets.
        settings: What they were made with.
        out: Folder.
        closeup: Of the first model, for the page; see ``look_closely``.

    Raises:
        ModesFxError: A file cannot be written; says where its content is instead.
    """
    means = mean_rows(comparisons)
    facts = {
        "settings": dict(settings),
        "rows": [asdict(row) for row in means],
        "models": {name: asdict(each) for name, each in comparisons.items()},
    }
    lines = [{"model": name, **row.flat()} for name, each in comparisons.items() for row in each.rows]
    if len(comparisons) > 1:
        lines += [{"model": "mean", **row.flat()} for row in means]
    # The page last: what was measured is safe by then.
    data, table, page = in_any_case(
        lambda: write_atomically(out / "compare.json", strict_json.dumps(facts)),
        lambda: write_atomically(out / "compare.csv", _as_csv(lines)),
        lambda: write_comparison_page(facts, closeup, out / "compare.html"),
    )
    return page, data, table


def _as_csv(lines: Sequence[Mapping[str, Any]]) -> str:
    columns = dict.fromkeys(name for line in lines for name in line)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
