"""``modes-fx search``."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from modes_fx.cli import shared
from modes_fx.cli.terminal import console
from modes_fx.files import importance_fields

if TYPE_CHECKING:
    from modes_fx.calib.plainest import Worse
    from modes_fx.data import Samples

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def seconds(text: str) -> float:
    """Read ``90``, ``90s``, ``10m`` or ``2h``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None or not float(match[1]):
        raise typer.BadParameter(f"{text!r} is no time: expected seconds, or a number with m or h, such as 10m.")
    return float(match[1]) * _UNITS[match[2]]


def exponents(values: list[float]) -> list[float]:
    """Refuse gammas that are none; a callback."""
    for value in values:
        if not 0 <= value < math.inf:
            raise typer.BadParameter(f"{value:g} is no exponent: pass finite numbers >= 0.")
    return values


GammasOption = Annotated[list[float], typer.Option(callback=exponents, help="Exponents of the importance to try.")]


def search(
    model: shared.ModelArgument,
    data: shared.DataOption = None,
    importance: Annotated[Path, typer.Option(help="What `modes-fx calibrate` wrote.")] = Path("importance.json"),
    out: Annotated[Path, shared.output_file("File for the plan.")] = Path("plan.json"),
    targets: shared.TargetsOption = [0.5, 0.75, 0.875],  # noqa: B006
    gammas: GammasOption = [0.0, 0.25, 0.5, 1.0],  # noqa: B006
    grid_size: Annotated[int, typer.Option(min=2, help="Thresholds tried for each modality.")] = 24,
    held_out: Annotated[Path | None, typer.Option(help="Other data, to measure each chosen point on.")] = None,
    held_out_split: Annotated[str | None, typer.Option(help="Its split.")] = None,
    hold_back: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of the data that takes the place of --held-out where there is none.")
    ] = 0.2,
    journal: shared.JournalOption = None,
    time_budget: Annotated[
        float | None,
        typer.Option(parser=seconds, metavar="TIME", help="Take the best found after so long: seconds, 10m or 2h."),
    ] = None,
    data_format: shared.FormatOption = None,
    split: shared.SplitOption = None,
    samples: shared.SamplesOption = 1024,
    max_bad: shared.MaxBadOption = 0.05,
    seed: shared.SeedOption = 0,
    batch_size: shared.BatchSizeOption = 8,
    dtype: shared.DtypeOption = "auto",
    device: shared.DeviceOption = None,
    device_map: shared.DeviceMapOption = None,
    trust_remote_code: shared.TrustOption = False,
) -> None:
    """Find, for each target skip ratio, the thresholds that change the model's answers least; write them as a plan."""
    source = shared.Source(data, data_format, split, samples, seed, max_bad)
    other = shared.Source(held_out, data_format, held_out_split, samples, seed, max_bad)
    shared.check_data(other)
    shared.check_inputs(model, source)
    importance_fields.read(importance, quiet=True)

    from modes_fx.calib import processes
    from modes_fx.calib import search as find
    from modes_fx.calib.importance_file import ImportanceFile
    from modes_fx.calib.plainest import worse_than_reduce_k

    shared.check_device(device, device_map)
    with shared.session(device) as bars:
        known = processes.together(lambda: ImportanceFile.load(importance))
        network, processor = shared.load_model(
            model, dtype=dtype, device=device, device_map=device_map, trust_remote_code=trust_remote_code
        )
        known.check_model(network)
        drawn = shared.load_samples(source)
        fresh_samples: Samples | None = None
        if held_out is not None:
            fresh_samples = shared.load_samples(other)
        elif int(len(drawn) * hold_back) >= processes.world():
            drawn, fresh_samples = drawn.held_back(hold_back)
            console.print(f"{len(fresh_samples)} of them are held back, to measure the plan on.", highlight=False)
        batches = shared.load_batches(network, processor, drawn, batch_size, bars)
        fresh = None if fresh_samples is None else shared.load_batches(network, processor, fresh_samples, batch_size, bars)
        plan = find(
            network, batches, known.importance, targets, gammas=gammas, grid_size=grid_size, held_out=fresh,
            journal=journal, time_budget=time_budget,
            on_progress=lambda done, total: bars("search for thresholds", done, total),
        )  # fmt: skip
        plan = plan.with_provenance(seed=seed, command=["modes-fx", *sys.argv[1:]])
        processes.from_main(lambda: plan.save(out))
        _print(plan.provenance["search"], plan, out)
        if fresh is not None:
            say_worse(worse_than_reduce_k(network, plan, fresh))


def say_worse(points: Sequence[Worse]) -> None:
    """Print which targets lose more than Reduce-k, and what to do."""
    for worse in points:
        console.print(
            f"Target {worse.target:g} is worse than the plainest rule: on the held-out data it skips {worse.ratio:.1%} at a "
            f"KL of {worse.kl:.1e}, where keeping each token's {worse.k} largest weights costs {worse.kl_of_k:.1e}. Search "
            "with more --samples or a larger --grid-size.",
            highlight=False,
        )


def _print(facts: dict[str, Any], plan: Any, out: Path) -> None:
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("target", "skipped", "text", "vision", "KL, nats", "held out", "at best", "gamma"):
        table.add_column(heading, justify="right", no_wrap=True)
    bounds = {row["target"]: row for row in facts["lower_bounds"]}
    for point in plan.points:
        ratios = (f"{point.realised[name]:.1%}" if name in point.realised else "" for name in ("calibration", "text", "vision"))
        least = f"{min(bounds[point.target]['lower_bound'], point.kl['calibration']):.2e}"
        fresh = f"{point.kl['held_out']:.2e}" if "held_out" in point.kl else ""
        table.add_row(f"{point.target:g}", *ratios, f"{point.kl['calibration']:.2e}", fresh, least, f"{point.gamma:g}")
    console.print(table)
    for row in facts["lower_bounds"]:
        if row["kl"] is None:
            console.print(f"Target {row['target']:g} was not reached.")
    if facts["complete"] and not facts["violations"]:
        console.print("The search is complete: no choice of its grids reaches a target at less, by all that was evaluated.")
    elif not facts["complete"]:
        left = [f"{gamma:g}" for gamma in facts["gammas"] if gamma not in facts["gammas_searched"]]
        console.print(
            "The time budget ended the search. 'at best' is what no choice of its grids can be below"
            + (f"; of the gammas begun: {_begun(facts)}; not begun: gamma {', '.join(left)}" if left else "")
            + ". Give it more time, with the same journal, to go on."
        )
    if facts["violations"]:
        sizes = " and ".join(f"{size:.1e} of {name}" for name, size in facts["largest_violations"].items() if size)
        console.print(
            f"Where thresholds rose, the loss f or the skip ratio g fell {facts['violations']} times (at most {sizes}): "
            "each point reaches its target on these data, but a better one may have been missed."
        )
    console.print(
        f"{facts['evaluations']} evaluations ({facts['from_journal']} from the journal), {facts['refined']} of them off the "
        f"grids, which have {facts['exhaustive']:,} choices; "
        f"{facts['seconds']:.0f} s. Written to {escape(str(out))}",
        highlight=False,
    )


def _begun(facts: dict[str, Any]) -> str:
    bounds = ((row["lower_bound_of_gammas_searched"], row["target"]) for row in facts["lower_bounds"])
    return ", ".join(f"{bound:.2e} at {target:g}" for bound, target in bounds if bound is not None)
