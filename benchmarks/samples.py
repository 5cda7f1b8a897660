"""On how many samples are thresholds found that hold elsewhere, and what does each number cost?

    python benchmarks/samples.py MODEL --data A --test-data B [--sizes 24 48 96] [--draws 4] [--targets 0.5 0.75 0.875]
        [--grid-size 14] [--json FILE]

For each size, as many samples are drawn from A, importance and thresholds are found on them, and the plan is measured on B: KL
in nats an answer token, the mean over the draws with the least and the most of them. Cost is counted in forwards of one sample:
of the layers' importance, and of the search.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

import modes_fx
from modes_fx.calib import Objective, layer_importance, search
from modes_fx.data import load_samples, make_batches
from modes_fx.files.writing import check_writable, write_atomically
from modes_fx.models.device import cpu_name
from modes_fx.models.loading import load

BATCH_SIZE = 8


def drawn(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield, for each size and draw, what was found on it and what that does to the test data."""
    model, processor = load(options.model, dtype="float32")
    modes_fx.optimize(model)
    held = Objective(model, make_batches(load_samples(options.test_data, limit=None), processor, BATCH_SIZE))
    for size in options.sizes:
        for draw in range(options.draws):
            batches = list(make_batches(load_samples(options.data, limit=size, seed=draw), processor, BATCH_SIZE))
            importance = layer_importance(model, batches)
            plan = search(model, batches, importance, options.targets, grid_size=options.grid_size)
            forwards = importance.forwards + plan.provenance["search"]["evaluations"]
            row = {"samples": size, "draw": draw, "forwards": size * forwards, "points": []}
            for point in plan.points:
                found = held.evaluate(plan.bounds(held.num_layers, point.target))
                row["points"].append(
                    {
                        "target": point.target,
                        "gamma": point.gamma,
                        "calibration": {"kl": point.kl["calibration"], "skipped": point.realised["calibration"]},
                        "test": {"kl": found.kl, "skipped": found.skip_ratio},
                    }
                )
            print(json.dumps(row), flush=True)
            yield row


def table(rows: Sequence[dict[str, Any]], targets: Sequence[float]) -> str:
    """Return one line for each size."""
    lines = []
    for size in dict.fromkeys(row["samples"] for row in rows):
        mine = [row for row in rows if row["samples"] == size]
        cells = [_cell([p["test"] for row in mine for p in row["points"] if p["target"] == target]) for target in targets]
        lines.append([size, f"{math.fsum(row['forwards'] for row in mine) / len(mine):,.0f}", *cells])
    heads = ["samples", "forwards", *(f"KL at {target:.1%}".replace(".0%", "%") for target in targets)]
    return tabulate(lines, heads, tablefmt="github", disable_numparse=True)


def _cell(found: Sequence[dict[str, float]]) -> str:
    losses = sorted(each["kl"] for each in found)
    if not losses:
        return "not reached"
    skipped = sorted(each["skipped"] for each in found)
    kl = f"{math.fsum(losses) / len(losses):.1e} ({losses[0]:.0e} to {losses[-1]:.0e})"
    return f"{kl} at {skipped[0]:.1%} to {skipped[-1]:.1%}"


def main() -> None:
    """Draw, search, measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="demo, a folder or a hub id")
    parser.add_argument("--data", required=True, help="samples to draw from")
    parser.add_argument("--test-data", required=True, help="samples to measure on")
    parser.add_argument("--sizes", nargs="+", type=int, default=[24, 48, 96])
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--targets", nargs="+", type=float, default=[0.5, 0.75, 0.875])
    parser.add_argument("--grid-size", type=int, default=14)
    parser.add_argument("--json", type=Path, help="also write what each draw gave to this file")
    options = parser.parse_args()
    found = load_samples(options.data, limit=max(options.sizes)).report.found
    if found < max(options.sizes):
        parser.error(f"{options.data} holds {found} samples: no draw of {max(options.sizes)}")
    if options.json:
        check_writable(options.json)
    print(f"{options.model}, float32, {cpu_name()}")
    rows = list(drawn(options))
    if options.json:
        write_atomically(options.json, json.dumps(rows, indent=2) + "\n")
    print(table(rows, options.targets))


if __name__ == "__main__":
    main()
