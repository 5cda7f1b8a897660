"""``modes-fx import-reference``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modes_fx.cli import shared
from modes_fx.cli.shared import output_file
from modes_fx.cli.terminal import be_quiet, console


def import_reference(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a config.json, or the id of a hub model.")],
    importance: Annotated[Path, typer.Option(help="The reference's importance of each layer: torch.save or pickle.")],
    tau: Annotated[Path, typer.Option(help="The reference's thresholds: torch.save or pickle.")],
    out: Annotated[Path, output_file("File for the plan.")] = Path("plan.json"),
    normalized_on_load: Annotated[
        bool, typer.Option("--normalized-on-load", help="The thresholds are meant for importances made to sum to 1.")
    ] = False,
    trust_remote_code: shared.TrustOption = False,
) -> None:
    """Make a plan of the files of MoDES's reference implementation; nothing in them is run."""
    for file in (importance, tau):
        shared.check_readable(file)
    shared.check_model(model)

    from modes_fx.calib.reference import import_reference as convert
    from modes_fx.models.meta_model import read_config

    be_quiet()
    config = read_config(model, trust_remote_code=trust_remote_code)
    plan = convert(importance, tau, config, normalized_on_load=normalized_on_load)
    plan.save(out)
    facts = plan.provenance
    sums = ", ".join(f"{total:.4g} for {modality}" for modality, total in facts["importance_sums"].items())
    console.print(
        f"{len(plan.alpha or ())} layers, {len(plan.points)} pairs of thresholds (targets "
        f"{', '.join(f'{target:g}' for target in plan.targets) or 'not named'}). Importances summed to {sums}; routing weights "
        f"are scaled by {facts['routed_scaling_factor']:g}. Written to {out}",
        highlight=False,
        markup=False,
    )
