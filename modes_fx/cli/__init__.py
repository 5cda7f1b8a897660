"""The ``modes-fx`` command: one file a command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.markup import escape

from modes_fx.cli import bench, calibrate, compare, demo, import_reference, inspect, plan, search, shared
from modes_fx.cli.terminal import console, errors
from modes_fx.errors import ModesFxError, printable

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        from modes_fx import __version__

        console.print(__version__)
        raise typer.Exit


@app.callback()
def modes_fx(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Skip the experts of a Mixture-of-Experts vision-language model that do not matter for a token."""


app.command()(demo.demo)
app.command()(inspect.inspect)
app.command()(calibrate.calibrate)
app.command(cls=shared.SeveralValues)(search.search)
app.command(cls=shared.SeveralValues)(compare.compare)
app.command(cls=shared.SeveralValues)(bench.bench)
app.command("import-reference")(import_reference.import_reference)
app.add_typer(plan.app, name="plan")


def main() -> None:
    """Run the command; a ``ModesFxError`` ends it with its message alone."""
    try:
        app()
    except ModesFxError as error:
        errors.print(f"[red]Error:[/] {escape(printable(str(error)))}", highlight=False)
        sys.exit(1)
