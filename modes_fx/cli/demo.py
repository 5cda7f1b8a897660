"""``modes-fx demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from modes_fx.cli.shared import DeviceOption, output_folder, say_without_figures
from modes_fx.cli.terminal import Bars, be_quiet, console
from modes_fx.models.locating import locate


def demo(
    out: Annotated[Path, output_folder("Folder for the plan and the report.")] = Path("out/demo"),
    checkpoint: Annotated[
        Path | None, typer.Option(help="Another of its kind, by examples/train_demo_model.py; none takes the embedded one.")
    ] = None,
    device: DeviceOption = None,
    quick: Annotated[bool, typer.Option(help="Little data and few timed rounds: a check that everything runs.")] = False,
) -> None:
    """Calibrate, search, skip, evaluate and time on the embedded model: the whole job, in minutes."""
    if checkpoint is not None:
        locate(checkpoint)

    from modes_fx.demo import load
    from modes_fx.measure.demo.run import Size, run_demo
    from modes_fx.models.device import choose_device

    where = choose_device(device)
    be_quiet()
    say_without_figures()
    size = Size(calibration_images=4, held_out_images=2, test_images=8, grid_size=6, rounds=2) if quick else Size()

    def fresh() -> tuple[Any, Any]:
        model, processor = load(folder=checkpoint)
        return model.to(where), processor  # type: ignore[arg-type]  # as transformers declares it

    with Bars() as bars:
        facts = run_demo(fresh, out, size=size, progress=bars)
    _print_demo(facts, out)


def _print_demo(facts: dict[str, Any], out: Path) -> None:
    dense, speed, model = facts["dense"], facts["speed"], facts["model"]
    console.print(
        f"\n[bold]{model['name']}[/], {model['parameters'] / 1e6:.1f} M parameters, {model['layers']} MoE layers, "
        f"top-{model['top_k']} of {model['experts']} experts: {facts['sites']['rewritten']} of {facts['sites']['found']} "
        f"routing sites rewritten; {facts['search']['evaluations']} evaluations instead of {facts['search']['exhaustive']}\n"
    )
    prefill, decode = speed["prefill_ms"], speed["decode_ms_per_token"]
    best_prefill, best_decode = (
        min(value for name, value in times.items() if name.startswith("stock")) for times in (prefill, decode)
    )

    def ratios(setting: str) -> tuple[str, str]:
        return f"{best_prefill / prefill[setting]:.2f}x", f"{best_decode / decode[setting]:.2f}x"

    table = Table(
        title=f"Test split, {dense['n']} questions; speed against the fastest stock setting", box=SIMPLE, padding=(0, 1, 0, 0)
    )
    for heading in ("rule", "skipped", "text", "vision", "KL, nats", "correct", "prefill", "decode"):
        table.add_column(heading, justify="left" if heading == "rule" else "right", no_wrap=True)
    table.add_row("all kept", "0%", "0%", "0%", "0", f"{dense['accuracy']:.1%}", *ratios("modes-fx, all kept"))
    for row in facts["targets"]:
        table.add_row(
            f"modes-fx {row['target']:g}",
            f"{row['realised']['test']:.1%}",
            f"{row['realised']['text']:.1%}",
            f"{row['realised']['vision']:.1%}",
            f"{row['kl']['test']:.1e}",
            f"{row['accuracy']:.1%}",
            *ratios(f"modes-fx at {row['target']:g}"),
        )
    table.add_section()
    for row in facts["reduce_k"]:
        table.add_row(f"Reduce-k {row['k']}", f"{row['ratio']:.1%}", "", "", f"{row['kl']:.1e}", f"{row['accuracy']:.1%}")
    console.print(table)
    stock = "; ".join(f"{name} {prefill[name]:.0f}, {decode[name]:.1f}" for name in prefill if name.startswith("stock"))
    setup = speed["setup"]
    hardware = ", ".join(setup[name] for name in ("cpu", "gpu") if name in setup)
    console.print(
        f"Stock, prefill ms and decode ms a token: {stock}. Batch {setup['batch']}, {setup['prompt_tokens']} tokens, "
        f"{setup['threads']} threads, {hardware}.\nWritten to {escape(str(out))}: plan.json, report.json and report.html"
    )
