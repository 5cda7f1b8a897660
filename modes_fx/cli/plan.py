"""``modes-fx plan check`` and ``modes-fx plan sign``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modes_fx.cli.terminal import console
from modes_fx.errors import printable

if TYPE_CHECKING:
    from modes_fx.plan import SkipPlan

app = typer.Typer(no_args_is_help=True, help="Look at a plan file, or sign one that was changed by hand.")

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A plan file.")]


@app.command()
def check(file: FileArgument) -> None:
    """Say whether a plan file is whole and as it was written, and what it holds."""
    from modes_fx.files import plan_fields

    plan_fields.read(file, quiet=True)
    _print(_load(file), "whole")


@app.command()
def sign(file: FileArgument) -> None:
    """Give a plan file that was changed on purpose, or has no digest yet, the digest of what it holds now."""
    from modes_fx.files import plan_fields

    plan_fields.read(file, check_digest=False)
    plan = _load(file, check_digest=False)
    plan.save(file)
    _print(plan, "signed")


def _load(file: Path, check_digest: bool = True) -> SkipPlan:
    from modes_fx.plan import SkipPlan

    return SkipPlan.load(file, check_digest=check_digest)


def _print(plan: SkipPlan, state: str) -> None:
    targets = ", ".join(f"{target:g}" for target in plan.targets) or "none, thresholds given by hand"
    said = printable(
        f"The plan is {state}: rule {plan.rule}, targets {targets}, for {plan.model.get('model_type', 'any model')}"
        f"{f', {len(plan.layers)} MoE layers' if plan.layers else ''}."
    )
    console.print(said, highlight=False, markup=False)
