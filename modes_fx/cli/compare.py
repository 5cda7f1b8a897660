"""``modes-fx compare``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from modes_fx.cli import shared
from modes_fx.cli.terminal import console
from modes_fx.errors import CalibrationError, ModelError, in_a_line
from modes_fx.files.importance_fields import Mode
from modes_fx.models.locating import DEMO

if TYPE_CHECKING:
    from modes_fx.measure.compare import Comparison, Row
    from modes_fx.modality import Phase
    from modes_fx.plan import SkipPlan

_SAMPLES = 1024
_PHASES = Literal["prefill", "decode"]  # modality.Phase, without importing torch


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
    test_data: Annotated[Path | None, typer.Option("--test-data", help="Other data, to measure on.")] = None,
    test_split: Annotated[str | None, typer.Option(help="Its split.")] = None,
    targets: shared.TargetsOption = [0.5, 0.67, 0.75, 0.83, 0.88],  # noqa: B006
    rules: Annotated[list[str] | None, typer.Option(help="Rules to compare; all of the phase if left out.")] = None,
    phase: Annotated[
        str,
        typer.Option(
            help="prefill: at equal shares of (token, expert) pairs skipped. decode: at equal shares of experts that steps of "
            "--batch-size sequences leave unread."
        ),
    ] = "prefill",
    out: Annotated[Path, shared.output_folder("Folder for compare.html, compare.json and compare.csv.")] = Path("out/compare"),
    importance_mode: Annotated[str, typer.Option(help="reference or paper; see calibrate.")] = "reference",
    grid_size: Annotated[int, typer.Option(min=2, help="Thresholds tried for each modality, where pairs are searched.")] = 24,
    tolerance: Annotated[float, typer.Option(min=0.0, help="How far above its target a skip ratio may be.")] = 0.005,
    speed: Annotated[
        bool, typer.Option("--speed", help="Time prefill and decoding against stock, each in its fastest setting.")
    ] = False,
    journal: shared.JournalOption = None,
    data_format: shared.FormatOption = None,
    split: shared.SplitOption = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="Samples to draw from the data: 1024, or the demo's 96, if left out.")
    ] = None,
    max_bad: shared.MaxBadOption = 0.05,
    test_samples: Annotated[
        int | None, typer.Option(min=1, help="Samples to draw from the test data: 1024, or the demo's 512, if left out.")
    ] = None,
    seed: shared.SeedOption = 0,
    batch_size: shared.BatchSizeOption = 8,
    dtype: shared.DtypeOption = "auto",
    device: shared.DeviceOption = None,
    device_map: shared.DeviceMapOption = None,
    trust_remote_code: shared.TrustOption = False,
) -> None:
    """Compare skipping rules at equal skip ratios: each tuned on one set of data, measured on another."""
    built_in = data == DEMO or (data is None and DEMO in models)
    if not built_in and (data is None or test_data is None):
        raise CalibrationError("A comparison needs --data to tune on and --test-data to measure on (or MODEL demo).")
    ignored = {"--test-data": test_data, "--test-split": test_split, "--split": split, "--data-format": data_format}
    if built_in and (named := [name for name, value in ignored.items() if value is not None]):
        raise CalibrationError(f"{', '.join(named)} would be ignored: the demo's built-in data are used. Pass --data too.")
    if len(set(models)) < len(models):
        raise ModelError(f"{', '.join(models)}: a model is given twice. Name each once.")
    tune_on = None if built_in or data is None else Path(data)
    sources = (
        shared.Source(tune_on, data_format, split, samples or _SAMPLES, seed, max_bad),
        shared.Source(test_data, data_format, test_split, test_samples or _SAMPLES, seed, max_bad, "test"),
    )
    shared.check_choice("mode", importance_mode, Mode)
    shared.check_choice("phase", phase, _PHASES)
    for source in sources:
        shared.check_data(source)
    for name in models:
        shared.check_model(name)

    from modes_fx.calib.trials import data_hash, versions
    from modes_fx.measure.compare import compare as run
    from modes_fx.measure.compare.contenders import contenders_of
    from modes_fx.measure.compare.output import mean_rows, write
    from modes_fx.measure.compare.rows import short_names
    from modes_fx.measure.page.closeup import Closeup, look_closely

    shared.check_device(device, device_map)
    contenders_of(rules, cast("Phase", phase), timed=speed)
    _check_one_architecture(models, trust_remote_code)
    shared.say_without_figures()
    names = short_names(models)
    found: dict[str, Comparison] = {}
    closeups: list[Closeup] = []
    hashes: dict[str, str] = {}
    with shared.session(device) as bars:
        for name in models:
            network, processor = shared.load_model(
                name, dtype=dtype, device=device, device_map=device_map, trust_remote_code=trust_remote_code
            )
            tune = shared.load_batches(network, processor, sources[0], batch_size, bars, by_answer=phase == "decode")
            asked = shared.load_samples(sources[1])
            test = shared.load_batches(network, processor, asked, batch_size, bars, by_answer=phase == "decode")
            hashes = {"calibration": data_hash(tune), "test": data_hash(test)}

            def look(model: Any, plan: SkipPlan, data: Any = (processor, test, asked), name: str = names[name]) -> None:
                step = partial(bars, f"{name}: samples to show")
                try:
                    closeups.append(look_closely(model, plan, *data, on_step=step))
                except Exception as error:  # whatever a model's generate() raises: hours of measuring are not lost for pictures
                    console.print(f"[yellow]No samples to show[/]: {escape(in_a_line(error))}")

            found[name] = run(
                network, tune, test, targets, rules, phase=cast("Phase", phase), importance_mode=cast(Mode, importance_mode),
                grid_size=grid_size, tolerance=tolerance, seed=seed, timed=speed, journal=journal,
                look=look if name == models[0] else None,
                progress=lambda part, done, total, name=names[name]: bars(f"{name}: {part}", done, total),
            )  # fmt: skip
        settings = {
            "models": models, "targets": list(targets), "phase": phase, "importance_mode": importance_mode,
            "grid_size": grid_size, "tolerance": tolerance, "seed": seed, "data_hash": hashes, "dtype": dtype,
            "versions": versions(),
        }  # fmt: skip
        paths = write(found, settings, out, closeups[0] if closeups else None)
    _print(mean_rows(found), found, [str(path) for path in paths])


def _check_one_architecture(models: Sequence[str], trust_remote_code: bool) -> None:
    """Compare configs before any model is measured.

    Raises:
        ModelError: A model is missing, or of another architecture than the first.
    """
    from modes_fx.models.meta_model import read_config
    from modes_fx.plan import config_hash

    hashes: dict[str, str] = {}
    for name in models if len(models) > 1 else ():
        config = read_config(name, trust_remote_code=trust_remote_code)
        hashes[name] = config_hash(config)
        if hashes[name] != hashes[models[0]]:
            raise ModelError(f"{name} is of another architecture than {models[0]}: they have no mean.")


def _print(rows: Sequence[Row], found: Mapping[str, Comparison], paths: Sequence[str]) -> None:
    several = len(found) > 1
    scores = ", ".join(f"{each.unskipped['score']:.1%}" for each in found.values())
    samples = next(iter(found.values())).samples
    ends = f"95% of the mean over {len(found)} models, Student's t" if several else "95% over samples, paired bootstrap"
    table = Table(title=f"Test data, {samples} samples; unskipped score {scores}.\nIn brackets: {ends}", box=SIMPLE, padding=0)
    # Of several models the divergence's interval takes the room of columns that are in the files too.
    left_out = {"text", "vision", "flips", "pairs"} if several else set()
    decoded = next(iter(found.values())).phase == "decode"
    left_out |= {"skipped", "text", "vision"} if decoded else {"unread", "pairs"}
    headings = [name for name in _HEADINGS if name not in left_out]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "rule" else "right", no_wrap=True)
    for target in dict.fromkeys(row.target for row in rows):
        table.add_section()
        table.add_row(f"[bold]{target:.1%}[/]")
        for row in (row for row in rows if row.target == target):
            if row.status == "unreachable":
                table.add_row(row.title, f"[yellow]at most {row.largest:.1%}[/]")
                continue
            cells = {name: f"{row.skipped[key]:.1%}" for name, key in _RATIOS.items() if key in row.skipped}
            if row.status == "overshot":
                cells |= {name: f"[yellow]{cells[name]}[/]" for name in ("skipped", "unread")}
            cells |= {name: f"{row.metrics[name]:.1%}" for name in ("flips", "score")}
            cells |= {"rule": row.title, "KL": _kl(row, several), "retained": _retained(row)}
            table.add_row(*(cells.get(heading, "") for heading in headings))
    console.print(table)
    _print_ablation(rows)
    _print_speed([row for row in rows if row.speed], found)
    if any(row.status == "overshot" for row in rows):
        console.print("[yellow]Yellow[/]: the rule has no setting nearer above its target.")
    if decoded:
        console.print("unread: experts that decode steps leave, of those that the unskipped model's read. pairs: skipped.")
    console.print(
        "KL: nats an answer token. flips: answer tokens whose likeliest token changes. retained: score / unskipped score."
    )
    console.print(f"Written to {' and '.join(paths)}", highlight=False, markup=False)


_HEADINGS = ("rule", "skipped", "unread", "text", "vision", "pairs", "KL", "flips", "score", "retained")
_RATIOS = {"skipped": "all", "unread": "all", "text": "text", "vision": "vision", "pairs": "decode"}


def _print_ablation(rows: Sequence[Row]) -> None:
    """Print what each part of the method does on its own, where more than one was compared."""
    from modes_fx.measure.compare.contenders import ABLATION

    parts = {name: [row for row in rows if row.rule == name] for name in ABLATION}
    parts = {name: mine for name, mine in parts.items() if mine}
    if len(parts) < 2:
        return
    targets = [row.target for row in next(iter(parts.values()))]
    table = Table(title="The parts of the method: KL at each target", box=SIMPLE, padding=0)
    for heading in ("part", "layers' weight", "thresholds", *(f"{target:.1%}" for target in targets)):
        table.add_column(heading, justify="left" if heading == "part" else "right", no_wrap=True)
    for name, mine in parts.items():
        cells = ("" if row.status == "unreachable" else f"{row.metrics['kl']:.1e}" for row in mine)
        table.add_row(mine[0].title, *_PARTS[name], *cells)
    console.print(table)


_PARTS = {
    "threshold": ("1", "one"),
    "gmlg": ("alpha", "one"),
    "dmt": ("1", "text, vision"),
    "modes": ("alpha", "text, vision"),
    "tempered": ("alpha^gamma", "text, vision"),
}


def _print_speed(rows: Sequence[Row], found: Mapping[str, Comparison]) -> None:
    from modes_fx.measure.compare.rows import short_names

    if not rows:
        return
    title = "Times as fast as stock's fastest setting, and what generation skipped.\nIn brackets: least and most of the rounds"
    table = Table(title=title, box=SIMPLE, padding=0)
    for heading in ("rule", "target", "prefill", "skipped", "decode", "skipped"):
        table.add_column(heading, justify="left" if heading == "rule" else "right", no_wrap=True)
    for row in rows:
        skipped = {phase: f"{row.skipped[phase]:.1%}" if phase in row.skipped else "" for phase in row.speed}
        cells = (cell for phase in row.speed for cell in (_times(row, phase), skipped[phase]))
        table.add_row(row.title, f"{row.target:.1%}", *cells)
    console.print(table)
    for name, each in zip(short_names(found).values(), found.values(), strict=True):
        if each.timing:
            stock, ours = each.timing["stock_ms"], each.timing["ours_times"]
            bars = (f"{phase} {bar}, {stock[bar][phase]:.1f} ms" for phase, bar in each.timing["fastest"].items())
            console.print(f"Stock's fastest of {len(stock)} settings, {name}: {'; '.join(bars)} a token.")
            mine = (f"{phase} {best}, {ours[best][phase]:.2f}x" for phase, best in each.timing["ours"].items())
            console.print(f"Our fastest of {len(ours)}, with nothing skipped: {'; '.join(mine)}.")


def _times(row: Row, phase: str) -> str:
    if math.isnan(row.speed[phase]):
        return "not told"
    low, high = row.speed_range.get(phase, (math.nan, math.nan))
    return f"{row.speed[phase]:.2f}x" + ("" if math.isnan(low) else f" [dim]({low:.2f} {high:.2f})[/]")


def _kl(row: Row, several: bool) -> str:
    low, high = row.intervals["kl"]
    return f"{row.metrics['kl']:.1e}" + (f" [dim]({low:.1e} {high:.1e})[/]" if several else "")


def _retained(row: Row) -> str:
    if "retained" not in row.metrics:  # the unskipped model answers nothing right
        return ""
    low, high = row.intervals["retained"]
    return f"{row.metrics['retained']:.1%} [dim]({low * 100:.1f} {high * 100:.1f})[/]"
