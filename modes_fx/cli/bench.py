"""``modes-fx bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from modes_fx.cli.shared import DeviceOption, output_file
from modes_fx.cli.terminal import Bars, be_quiet, console


def bench(
    preset: Annotated[str, typer.Option(help="Shape of the layers, such as kimi-vl-a3b.")] = "qwen3-vl-30b-a3b",
    parts: Annotated[list[str], typer.Option(help="What to measure: block, layers, growth, overhead.")] = ["block"],  # noqa: B006
    tokens: Annotated[list[int], typer.Option(help="Token counts of the MoE block.")] = [1, 64, 512],  # noqa: B006
    skip: Annotated[list[float], typer.Option(help="Skip ratios of the MoE block, in [0, 1).")] = [0.0, 0.5, 0.88],  # noqa: B006
    device: DeviceOption = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(help="Numbers of threads of the MoE block, all else runs on the last; torch's own if left out."),
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Decoder layers of the parts layers and overhead.")] = 2,
    prompt: Annotated[int, typer.Option(min=2, help="Tokens of the layers' prefill, three quarters of them visual.")] = 2048,
    cache: Annotated[int, typer.Option(min=1, help="Tokens in the cache of a decode step.")] = 1024,
    growth_to: Annotated[int, typer.Option(min=1, help="Most tokens of the growth.")] = 8192,
    skew: Annotated[str, typer.Option(help="How unevenly routers choose: uniform or zipf.")] = "uniform",
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; decode steps are timed three times as often.")] = 7,
    limit: Annotated[float, typer.Option(min=0, help="Seconds for each row of token counts, once it has three rounds.")] = 40,
    json_file: Annotated[Path | None, output_file("File for all that was measured.", "--json")] = None,
    plot: Annotated[Path | None, output_file("File for a plot, SVG.")] = None,
) -> None:
    """Time layers of a well-known shape with random weights: stock, modes-fx and, if installed, vLLM's CPU kernel, in turn."""
    from modes_fx.measure.bench.options import Options, Skew, check_plot

    options = Options(
        preset=preset, parts=parts, tokens=tokens, skips=skip, layers=layers, prompt=prompt, cache=cache, growth_to=growth_to,
        skew=cast(Skew, skew), rounds=rounds, limit_s=limit, threads=threads or (), device=device,
    )  # fmt: skip
    if plot is not None:
        check_plot(options)

    from modes_fx.files import strict_json
    from modes_fx.files.writing import write_atomically
    from modes_fx.measure.bench import output
    from modes_fx.measure.bench.parts import Bench, run
    from modes_fx.models.device import choose_device

    choose_device(device)
    be_quiet()

    def keep(found: Bench) -> None:
        if json_file is not None:
            write_atomically(json_file, strict_json.dumps(output.facts(found, options)))

    keep(Bench())  # a file that cannot be written is known before anything is measured
    with Bars() as bars:
        found = run(options, bars, keep)
    keep(found)
    for table in output.tables(found, options):
        console.print(table)
    for line in output.notes(found, options):
        console.print(line, highlight=False, markup=False)
    if plot is not None:
        write_atomically(plot, output.plot(found, options))
