"""``modes-fx calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from modes_fx.cli import shared
from modes_fx.cli.terminal import console
from modes_fx.files.importance_fields import Method, Mode


def calibrate(
    model: shared.ModelArgument,
    data: shared.DataOption = None,
    out: Annotated[Path, shared.output_file("JSON file for the importance of each layer.")] = Path("importance.json"),
    data_format: shared.FormatOption = None,
    split: shared.SplitOption = None,
    samples: shared.SamplesOption = 1024,
    max_bad: shared.MaxBadOption = 0.05,
    seed: shared.SeedOption = 0,
    batch_size: shared.BatchSizeOption = 8,
    mode: Annotated[
        str, typer.Option(help="reference: skip a layer for one modality at a time; paper: for all tokens.")
    ] = "reference",
    method: Annotated[
        str, typer.Option(help="resumed; naive: the same by whole forwards; estimate: rough, by a few backwards.")
    ] = "resumed",
    journal: shared.JournalOption = None,
    dtype: shared.DtypeOption = "auto",
    device: shared.DeviceOption = None,
    device_map: shared.DeviceMapOption = None,
    trust_remote_code: shared.TrustOption = False,
) -> None:
    """Measure how much each MoE layer matters, for text and for visual tokens: the importance that search needs."""
    source = shared.Source(data, data_format, split, samples, seed, max_bad)
    shared.check_choice("mode", mode, Mode)
    shared.check_choice("method", method, Method)
    shared.check_inputs(model, source)

    from modes_fx.calib.importance_file import ImportanceFile
    from modes_fx.calib.importance_journal import resumable_importance
    from modes_fx.calib.trials import data_hash

    shared.check_device(device, device_map)
    with shared.session(device) as bars:
        network, processor = shared.load_model(
            model, dtype=dtype, device=device, device_map=device_map, trust_remote_code=trust_remote_code
        )
        batches = shared.load_batches(network, processor, source, batch_size, bars)
        importance = resumable_importance(
            network, batches, cast(Mode, mode), cast(Method, method), journal=journal,
            on_step=lambda done, total: bars("importance of each layer", done, total),
        )  # fmt: skip
        file = ImportanceFile.of(network, importance, data_hash(batches))
        file.save(out)
        table = Table(box=SIMPLE, padding=(0, 1, 0, 0), title=f"KL in nats with a layer's experts skipped, {importance.method}")
        for heading in ("layer", "text", "vision", "alpha text", "alpha vision"):
            table.add_column(heading, justify="left" if heading == "layer" else "right")
        for name, kl, alpha in zip(file.layers, importance.kl, importance.alpha, strict=True):
            table.add_row(name, *(f"{value:.2e}" for value in kl), *(f"{value:.3f}" for value in alpha))
        console.print(table)
        console.print(
            f"{importance.answer_tokens} answer tokens, {importance.forwards:.1f} forwards over the data, "
            f"{importance.seconds:.0f} s. Written to {escape(str(out))}",
            highlight=False,
        )
