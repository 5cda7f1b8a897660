"""Cost and quality of calibration on the embedded model: ways to the layers' importance, and to the thresholds.

    python benchmarks/calibration.py [alpha] [--images 12] [--dtype float32] [--targets 0.75,0.875] [--threads 2] [--json FILE]

alpha: the importance of each layer by whole forwards, by resumed ones and by the estimate: seconds (graphs are compiled
before), forwards over the data, rank correlation with whole forwards, and the KL divergence, on other data, of the plans that
follow from each.

search, search100, processes: see ``calibration_search.py``. The first two take any model:

    python benchmarks/calibration.py search --model DIR --data FILE --search-images 8
"""

import argparse
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import calibration_search
import torch
from tabulate import tabulate
from torch import Tensor

import modes_fx
from modes_fx.calib import layer_importance, search
from modes_fx.demo import load, make_batches
from modes_fx.files.writing import write_atomically
from modes_fx.models.device import cpu_name
from modes_fx.models.locating import DEMO

Row = dict[str, Any]
METHODS = ("naive", "resumed", "estimate")


def alpha(options: argparse.Namespace) -> list[Row]:
    """Return one row for each method of ``layer_importance``."""
    model, processor = load(getattr(torch, options.dtype))
    batches, held_out = (make_batches(split, options.images, processor) for split in ("calibration", "validation"))
    targets = [float(item) for item in options.targets.split(",") if item]
    modes_fx.optimize(model)
    layer_importance(model, batches[:1], "paper", method="naive")  # compiles
    rows, exact = [], None
    for method in METHODS:
        found = layer_importance(model, batches, method=method)
        kl = torch.tensor(found.kl, dtype=torch.float64)
        exact = kl if exact is None else exact
        row: Row = {"method": found.method, "seconds": found.seconds, "forwards": found.forwards}
        row["largest difference"] = float(((kl - exact).abs() / exact.clamp(min=1e-30)).max())
        for index, modality in enumerate(("text", "vision")):
            row[f"rank correlation, {modality}"] = spearman(kl[:, index], exact[:, index])
        if targets and method != "resumed":  # which has the same figures
            plan = search(model, batches, found, targets, held_out=held_out, grid_size=options.grid)
            row |= {f"KL at {point.target:.1%}": point.kl["held_out"] for point in plan.points}
        rows.append(row)
    return rows


def spearman(values: Tensor, others: Tensor) -> float:
    """Return the rank correlation; equal values take the mean of their ranks."""
    ranks = torch.stack([_ranks(values), _ranks(others)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    below = (values.unsqueeze(1) > values).sum(dim=1)
    equal = (values.unsqueeze(1) == values).sum(dim=1)
    return below + (equal - 1) / 2


PARTS: dict[str, Callable[[argparse.Namespace], Sequence[Row]]] = {
    "alpha": alpha,
    "search": calibration_search.on_model,
    "search100": calibration_search.interpolated,
    "processes": calibration_search.one_and_two,
}


def main() -> None:
    """Run the parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all without any")
    parser.add_argument(
        "--model", default=DEMO, help="another than the embedded one, in the parts search and search100; with --data"
    )
    parser.add_argument("--data", help="file of its samples")
    parser.add_argument("--images", type=int, default=12, help="images, with 8 questions each")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--targets", default="0.75,0.875", help="skip ratios to search for, comma-separated; '' for none")
    parser.add_argument("--grid", type=int, default=14, help="thresholds tried for each modality")
    parser.add_argument("--search-images", type=int, default=2, help="images in the parts on searches")
    parser.add_argument("--search-grid", type=int, default=16, help="thresholds in the part search, whose square is evaluated")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    if (options.model == DEMO) != (options.data is None):
        parser.error("--model and --data go together")
    if options.data and not (options.parts and set(options.parts) <= {"search", "search100"}):
        parser.error("--model is for the parts search and search100: name them")
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(options.threads)
    print(f"{options.model}, {options.dtype}, {options.threads} threads, {cpu_name()}, torch {torch.__version__}")
    tables = {}
    for part in options.parts or PARTS:
        tables[part] = rows = PARTS[part](options)
        print(f"\n{part}")
        print(tabulate(rows, headers="keys", floatfmt=".4g"))
    if options.json:
        write_atomically(options.json, json.dumps(tables, indent=2) + "\n")


if __name__ == "__main__":
    main()
