"""``modes-fx import-reference``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modes_fx.cli.model import ModelArgument, TrustOption
from modes_fx.cli.terminal import be_quiet, console
from modes_fx.errors import ModelError


def import_reference(
    model: ModelArgument,
    importance: Annotated[Path, typer.Option(help="The reference's importance of each layer: torch.save or pickle.")],
    tau: Annotated[Path, typer.Option(help="The reference's thresholds: torch.save or pickle.")],
    out: Annotated[Path, typer.Option(help="File for the plan.")] = Path("plan.json"),
    normalized_on_load: Annotated[
        bool, typer.Option("--normalized-on-load", help="The thresholds are meant for importances made to sum to 1.")
    ] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Make a plan of the files of MoDES's reference implementation; nothing in them is run."""
    from transformers import AutoConfig

    from modes_fx.calib.reference import import_reference as convert

    be_quiet()
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read the config of {model}: {error}") from error
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
