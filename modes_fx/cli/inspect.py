"""``modes-fx inspect``."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from modes_fx.cli import shared
from modes_fx.cli.terminal import be_quiet, console, steps_shown
from modes_fx.errors import ModesFxError
from modes_fx.files.strict_json import INSPECTION_SCHEMA

if TYPE_CHECKING:
    from modes_fx.measure.inspection import Inspection


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A model folder, a config.json (weights are not needed), a hub model's id, or demo."
        ),
    ],
    device: Annotated[str, typer.Option(help="Where the model is meant to run: cpu or cuda.")] = "cpu",
    each: Annotated[bool, typer.Option("--all", help="One row for each layer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    trust_remote_code: shared.TrustOption = False,
) -> None:
    """Say which routing sites of a model would be rewritten, and why not the others; exit 1 if none would."""
    try:
        shared.check_model(model)
        from modes_fx.measure.inspection import inspect as inspect_model

        be_quiet()
        with steps_shown(), contextlib.redirect_stdout(sys.stderr):  # what a model's own code prints
            inspection = inspect_model(model, device=device, trust_remote_code=trust_remote_code)
    except ModesFxError as error:
        if not as_json:
            raise
        typer.echo(json.dumps({"schema": INSPECTION_SCHEMA, "error": str(error)}))
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(inspection.to_json())
    else:
        _print(inspection, each)
    if not inspection.rewritten:
        raise typer.Exit(1)


def _print(inspection: Inspection, each: bool) -> None:
    colour = "green" if not inspection.rejected and inspection.sites else "yellow" if inspection.rewritten else "red"
    console.print(f"[bold {colour}]{escape(inspection.headline)}[/]", highlight=False)
    if inspection.sites:
        from modes_fx.measure.inspection import HEADINGS

        _, _, *sizes, _ = HEADINGS
        table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
        table.add_column("site", overflow="fold")
        for heading in sizes:
            table.add_column(heading, justify="right", no_wrap=True)
        for (path, family, *numbers, verdict), site in inspection.rows(each=each):
            colour = "green" if site.status != "rejected" else "red"
            table.add_row(f"{escape(path)}\n[dim]{escape(family)}[/]  [{colour}]{escape(verdict)}[/]", *numbers)
        console.print(table)
    for line in inspection.explanations():
        console.print(escape(line), highlight=False)
