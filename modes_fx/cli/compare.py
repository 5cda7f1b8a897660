"""``modes-fx compare``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.box import SIMPLE
from rich.table import Table

from modes_fx.cli import shared
from modes_fx.cli.terminal import console
from modes_fx.errors import CalibrationError, ModelError
from modes_fx.loading import DEMO

if TYPE_CHECKING:
    from modes_fx.calib.objective import Batch
    from modes_fx.compare import Row
    from modes_fx.data import Sample
    from modes_fx.plan import SkipPlan

_DEMO_DATA = {"calibration": 12, "test": 64}  # images of each split; 8 questions each


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="A model folder, hub id or `demo`; of several of one architecture the mean is taken."
        ),
    ],
    data: Annotated[
        str | None, typer.Option("--data", help="Calibration data: file, folder or `demo`; left out for the demo model.")
    ] = None,
    test_data: Annotated[Path | None, typer.Option("--test-data", "--held-out", help="Other data, to measure on.")] = None,
    test_split: Annotated[str | None, typer.Option(help="Its split.")] = None,
    targets: Annotated[list[float], typer.Option(help="Skip ratios to reach, in [0, 1].")] = [0.5, 0.67, 0.75, 0.83, 0.88],  # noqa: B006
    rules: Annotated[list[str] | None, typer.Option(help="Rules to compare; all if left out.")] = None,
    out: Annotated[
        Path, typer.Option(file_okay=False, writable=True, help="Folder for compare.html, compare.json and compare.csv.")
    ] = Path("out/compare"),
    importance_mode: Annotated[str, typer.Option(help="reference or paper; see calibrate.")] = "reference",
    grid_size: Annotated[int, typer.Option(min=2, help="Thresholds tried for each modality, where pairs are searched.")] = 24,
    tolerance: Annotated[float, typer.Option(min=0.0, help="How far above its target a skip ratio may be.")] = 0.005,
    speed: Annotated[bool, typer.Option("--speed", help="Time prefill and decoding against stock.")] = False,
    data_format: shared.FormatOption = None,
    split: shared.SplitOption = None,
    samples: shared.SamplesOption = 1024,
    max_bad: shared.MaxBadOption = 0.05,
    test_samples: Annotated[int, typer.Option(min=1, help="Samples to draw from the test data.")] = 1024,
    seed: shared.SeedOption = 0,
    batch_size: shared.BatchSizeOption = 8,
    dtype: shared.DtypeOption = "auto",
    device_map: shared.DeviceMapOption = None,
    trust_remote_code: shared.TrustOption = False,
) -> None:
    """Compare skipping rules at equal skip ratios: each tuned on one set of data, measured on another."""
    from modes_fx.calib.importance import Mode
    from modes_fx.calib.trials import data_hash, versions
    from modes_fx.compare import CONTENDERS, Comparison
    from modes_fx.compare import compare as run
    from modes_fx.compare.output import mean_rows, write
    from modes_fx.demo import as_data, make_batches, make_samples
    from modes_fx.page.closeup import Closeup, look_closely

    built_in = data == DEMO or (data is None and DEMO in models)
    if not built_in and (data is None or test_data is None):
        raise CalibrationError("A comparison needs --data to tune on and --test-data to measure on (or MODEL demo).")
    ignored = {"--test-data": test_data, "--test-split": test_split, "--split": split, "--data-format": data_format}
    if built_in and (named := [name for name, value in ignored.items() if value is not None]):
        raise CalibrationError(f"{', '.join(named)} would be ignored: the demo's built-in data are used. Pass --data too.")
    if len(set(models)) < len(models):
        raise ModelError(f"{', '.join(models)}: a model is given twice. Name each once.")
    sources = (
        shared.Source(Path(str(data)), data_format, split, samples, seed, max_bad),
        shared.Source(cast(Path, test_data), data_format, test_split, test_samples, seed, max_bad),
    )
    found: dict[str, Comparison] = {}
    closeups: list[Closeup] = []
    hashes: dict[str, str] = {}
    kinds = set()
    with shared.session() as bars:
        for name in models:
            network, processor = shared.load_model(
                name, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code
            )
            kinds.add(_kind(network))
            if len(kinds) > 1:
                raise ModelError(f"{name} is of another architecture than {models[0]}: they have no mean.")
            tune: Sequence[Batch]
            test: Sequence[Batch]
            if built_in:
                tune, test = (make_batches(part, n, processor, batch_size, seed) for part, n in _DEMO_DATA.items())
                asked: Sequence[Sample] = as_data(make_samples("test", _DEMO_DATA["test"], seed))
            else:
                tune = shared.load_batches(network, processor, sources[0], batch_size)
                asked = shared.load_samples(sources[1])
                test = shared.load_batches(network, processor, asked, batch_size)
            hashes = {"calibration": data_hash(tune), "test": data_hash(test)}

            def look(model: Any, plan: SkipPlan, *about: Any, data: Any = (processor, test, asked), name: str = name) -> None:
                step = partial(bars, f"{Path(name).name}: samples to show")
                try:
                    closeups.append(look_closely(model, plan, *data, on_step=step))
                except Exception as error:  # whatever a model's generate() raises: hours of measuring are not lost for pictures
                    console.print(f"[yellow]No samples to show[/]: {type(error).__name__}: {error}")

            found[name] = run(
                network, tune, test, targets, rules or tuple(CONTENDERS), importance_mode=cast(Mode, importance_mode),
                grid_size=grid_size, tolerance=tolerance, seed=seed, timed=speed,
                look=look if name == models[0] else None,
                progress=lambda part, done, total, name=name: bars(f"{Path(name).name}: {part}", done, total),
            )  # fmt: skip
        settings = {
            "models": models, "targets": list(targets), "importance_mode": importance_mode, "grid_size": grid_size,
            "tolerance": tolerance, "seed": seed, "data_hash": hashes, "dtype": dtype, "versions": versions(),
        }  # fmt: skip
        paths = write(found, settings, out, closeups[0] if closeups else None)
    _print(mean_rows(found), found, [str(path) for path in paths])


def _kind(network: Any) -> tuple[str, str]:
    from modes_fx.plan import config_hash

    return type(network).__name__, config_hash(network.config)


def _print(rows: Sequence[Row], found: Any, paths: Sequence[str]) -> None:
    several = len(found) > 1
    scores = ", ".join(f"{each.unskipped['score']:.1%}" for each in found.values())
    samples = next(iter(found.values())).samples
    ends = f"smallest to largest of {len(found)} models" if several else "95% over samples, paired bootstrap"
    table = Table(title=f"Test data, {samples} samples; unskipped score {scores}.\nIn brackets: {ends}", box=SIMPLE, padding=0)
    for heading in ("rule", "skipped", "text", "vision", "KL", "flips", "score", "retained"):
        table.add_column(heading, justify="left" if heading == "rule" else "right", no_wrap=True)
    for target in dict.fromkeys(row.target for row in rows):
        table.add_section()
        table.add_row(f"[bold]{target:.1%}[/]")
        for row in (row for row in rows if row.target == target):
            if row.status == "unreachable":
                table.add_row(row.title, f"[yellow]at most {row.largest:.1%}[/]")
                continue
            ratios = [f"{row.skipped[name]:.1%}" if name in row.skipped else "" for name in ("all", "text", "vision")]
            if row.status == "overshot":
                ratios[0] = f"[yellow]{ratios[0]}[/]"
            metrics = row.metrics
            cells = (f"{metrics['kl']:.1e}", f"{metrics['flips']:.1%}", f"{metrics['score']:.1%}", _retained(row))
            table.add_row(row.title, *ratios, *cells)
    console.print(table)
    _print_speed([row for row in rows if row.speed])
    if any(row.status == "overshot" for row in rows):
        console.print("[yellow]Yellow[/]: the rule has no setting nearer above its target.")
    console.print(
        "KL: nats an answer token. flips: answer tokens whose likeliest token changes. retained: score / unskipped score."
    )
    console.print(f"Written to [bold]{'[/] and [bold]'.join(paths)}[/]", highlight=False)


def _print_speed(rows: Sequence[Row]) -> None:
    if not rows:
        return
    table = Table(title="Times as fast as stock, and what generation skipped", box=SIMPLE, padding=0)
    for heading in ("rule", "target", "prefill", "skipped", "decode", "skipped"):
        table.add_column(heading, justify="left" if heading == "rule" else "right", no_wrap=True)
    for row in rows:
        skipped = {phase: f"{row.skipped[phase]:.1%}" if phase in row.skipped else "" for phase in row.speed}
        cells = (cell for phase in row.speed for cell in (f"{row.speed[phase]:.2f}x", skipped[phase]))
        table.add_row(row.title, f"{row.target:.1%}", *cells)
    console.print(table)


def _retained(row: Row) -> str:
    if "retained" not in row.metrics:  # the unskipped model answers nothing right
        return ""
    low, high = row.intervals["retained"]
    return f"{row.metrics['retained']:.1%} [dim]({low * 100:.1f} {high * 100:.1f})[/]"
