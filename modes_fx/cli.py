"""The ``modes-fx`` command."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from modes_fx.errors import ModesFxError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()


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


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the plan, the report and the plots.")] = Path("out/demo"),
    checkpoint: Annotated[
        Path | None, typer.Option(help="Another checkpoint of the demo's kind; none takes the embedded one.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Little data and few timed rounds: a check that everything runs.")] = False,
) -> None:
    """Calibrate, search, skip, evaluate and time on the embedded model: the whole job, in minutes."""
    from modes_fx.demo import load
    from modes_fx.demo.run import Size, run_demo

    _be_quiet()
    size = Size(calibration_images=4, held_out_images=2, test_images=8, grid_size=6, rounds=2) if quick else Size()
    with _Bars() as bars:
        facts = run_demo(lambda: load(folder=checkpoint), out, size=size, progress=bars)
    _print_demo(facts, out)


class _Bars:
    """One progress bar for each part, made when the part first reports."""

    def __init__(self) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=console)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def __call__(self, part: str, done: int, total: int | None) -> None:
        if part not in self._tasks:
            for task in self._tasks.values():  # a part begins when the one before it has ended
                self._progress.update(task, total=self._progress.tasks[task].completed)
            self._tasks[part] = self._progress.add_task(part, total=total)
        self._progress.update(self._tasks[part], completed=done, total=total)


def _be_quiet() -> None:
    """Keep other libraries' notices off the screen."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    logging.getLogger("torch").setLevel(logging.ERROR)


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
    console.print(
        f"Stock, prefill ms and decode ms a token: {stock}. Batch {setup['batch']}, {setup['prompt_tokens']} tokens, "
        f"{setup['threads']} threads, {setup['cpu']}.\nWritten to [bold]{out}[/]: plan.json, report.json, report.html and plots"
    )


def main() -> None:
    """Run the command; a ``ModesFxError`` ends it with its message alone."""
    try:
        app()
    except ModesFxError as error:
        Console(stderr=True).print(f"[red]Error:[/] {error}", highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
