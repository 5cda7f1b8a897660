"""A benchmark as tables, as JSON and as a plot."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
import transformers
from rich.box import SIMPLE
from rich.table import Table

from modes_fx import __version__
from modes_fx.measure.bench.measure import Row
from modes_fx.measure.bench.options import Options
from modes_fx.measure.bench.parts import Bench
from modes_fx.measure.bench.presets import config_of
from modes_fx.models.device import cpu_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

JSON_SCHEMA = 2
_SLACK = 1.05  # a rise within the noise of a median is none
_SIZES = ("hidden_size", "moe_intermediate_size", "intermediate_size", "num_experts", "num_local_experts", "n_routed_experts",
          "num_experts_per_tok")  # fmt: skip


def facts(bench: Bench, options: Options) -> dict[str, Any]:
    """Return all that was measured, for JSON."""
    config = config_of(options.preset, options.layers)
    return {
        "schema": JSON_SCHEMA,
        "options": asdict(options),
        "shape": {name: getattr(config, name) for name in _SIZES if getattr(config, name, None) is not None},
        "cpu": cpu_name(),
        "versions": {"modes_fx": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "machines": [asdict(machine) for machine in bench.machines],
        "popularity": {"first": bench.popularity[0], "first_tenth": bench.popularity[1]},
        "rows": [asdict(row) for row in bench.rows],
        "growth": [asdict(row) | {"us_per_kept_pair": us, "rises": rises} for row, us, rises in growth(bench.rows, options)],
        "overhead": [asdict(each) for each in bench.overhead],
        "failed": bench.failed,
    }


def growth(rows: Sequence[Row], options: Options) -> list[tuple[Row, float, bool]]:
    """Return, for the rows of the growth, the time per kept pair, and whether it is above that of any fewer tokens.

    Microseconds; infinite where no pair was kept.
    """
    top_k = config_of(options.preset, 1).num_experts_per_tok
    least: dict[float, float] = {}
    found = []
    for row in (row for row in rows if row.part == "growth"):
        kept = row.tokens * top_k * (1 - row.skipped)
        us = 1e3 * row.ms / kept if kept else math.inf
        found.append((row, us, us > _SLACK * least.get(row.skip, math.inf)))
        least[row.skip] = min(us, least.get(row.skip, math.inf))
    return found


def tables(bench: Bench, options: Options) -> Iterator[Table]:
    """Return the tables to print: each part, prefill and decode apart, for each number of threads."""
    keys = dict.fromkeys((row.part, row.threads, row.phase) for row in bench.rows if row.part != "growth")
    for part, threads, phase in keys:
        rows = [row for row in bench.rows if (row.part, row.threads, row.phase) == (part, threads, phase)]
        yield _times(rows, f"{_TITLES[part].format(layers=options.layers)}, {phase}, {threads} threads")
    if found := growth(bench.rows, options):
        yield _growth_table(found)


_TITLES = {"block": "One MoE block", "layers": "{layers} decoder layers"}


def _times(rows: Sequence[Row], title: str) -> Table:
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("T", "setting", "skipped", "ms", "x stock", "x best", "limit ms", "x limit"):
        table.add_column(heading, justify="left" if heading == "setting" else "right", no_wrap=heading != "setting")
    for tokens in dict.fromkeys(row.tokens for row in rows):
        table.add_section()
        for row in (row for row in rows if row.tokens == tokens):
            style = "dim" if row.kind == "stock" and row.to_best > 1 else "bold" if row.kind == "ours" else None
            table.add_row(
                str(tokens), row.setting, f"{row.skipped:.0%}" if row.kind == "ours" else "", f"{row.ms:.2f}",
                *(_number(value) for value in (row.to_stock, row.to_best, row.limit_ms, row.to_limit)), style=style,
            )  # fmt: skip
    return table


def _growth_table(found: Sequence[tuple[Row, float, bool]]) -> Table:
    skips = list(dict.fromkeys(row.skip for row, _, _ in found))
    table = Table(title=f"Microseconds per kept pair, {found[0][0].threads} threads (* rises with T)", box=SIMPLE, padding=0)
    for heading in ("T", *(f"skip {skip:.0%}" for skip in skips)):
        table.add_column(heading, justify="right", no_wrap=True)
    for tokens in dict.fromkeys(row.tokens for row, _, _ in found):
        cells = [f"{us:.1f}{'*' if rises else ' '}" for row, us, rises in found if row.tokens == tokens]
        table.add_row(str(tokens), *cells)
    return table


def notes(bench: Bench, options: Options) -> Iterator[str]:
    """Return the lines to print under the tables."""
    for machine in bench.machines:
        yield (
            f"{machine.name}, {machine.threads} threads: reads {machine.bandwidth / 1e9:.1f} GB/s, bfloat16 GEMM "
            f"{machine.gemm_rate / 1e9:.0f} GFLOP/s; torch {torch.__version__}, transformers {transformers.__version__}."
        )
    first, tenth = bench.popularity
    yield f"Routing {options.skew}: the expert chosen most takes {first:.1%} of the pairs, the first tenth of them {tenth:.1%}."
    yield (
        "x stock: time / stock grouped_mm; x best: time / fastest stock setting; medians over rounds. limit: weights of "
        "experts with a kept pair / read bandwidth + FLOPs / GEMM rate."
    )
    if any(row.kind == "peer" for row in bench.rows):
        yield "The vLLM kernel computes every pair: it has no skipping."
    for each in bench.overhead:
        yield (
            f'Decode step of {options.layers} layers, nothing skipped, region="{each.region}": {each.step_us:.0f} us; around '
            f"the generated code {each.regions_us:.0f} (guards, look-ups, wrappers), modality ids {each.modality_us:.0f}: "
            f"{each.share:.1%} of it."
        )
    for name, why in bench.failed.items():
        yield f"Left out: {name}: {why}."


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def plot(bench: Bench, options: Options) -> bytes:
    """Draw times against stock's best by number of tokens, and the growth where it was measured, as SVG; see ``check_plot``."""
    from matplotlib.figure import Figure

    blocks = {machine.threads: [row for row in bench.rows if row.part == "block" and row.threads == machine.threads]
              for machine in bench.machines}  # fmt: skip
    panels = [threads for threads, rows in blocks.items() if rows]
    grown = growth(bench.rows, options)
    count = len(panels) + bool(grown)
    figure = Figure(figsize=(5.0 * count, 4.2), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for threads, panel in zip(panels, axes, strict=False):
        _draw_block(panel, blocks[threads], f"One MoE block of {options.preset}, {threads} threads")
    if grown:
        _draw_growth(axes[-1], grown)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()


def _draw_block(axes: Axes, rows: Sequence[Row], title: str) -> None:
    for name, skip in dict.fromkeys((row.setting, row.skip) for row in rows if row.kind != "stock"):
        mine = [row for row in rows if (row.setting, row.skip) == (name, skip)]
        tokens, label = [row.tokens for row in mine], f"{name}, skip {skip:.0%}"
        (line,) = axes.plot(tokens, [row.to_best for row in mine], marker="o", label=label)
        if mine[0].kind == "ours":
            limits = [row.to_best / row.to_limit for row in mine]
            axes.plot(tokens, limits, linestyle=":", color=line.get_color())
    axes.axhline(1, color="#595959", linewidth=1)
    axes.set(title=title, xlabel="tokens (dotted: limit of this machine)", ylabel="time / fastest stock setting")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _draw_growth(axes: Axes, found: Sequence[tuple[Row, float, bool]]) -> None:
    for skip in dict.fromkeys(row.skip for row, _, _ in found):
        points = [(row.tokens, us) for row, us, _ in found if row.skip == skip and math.isfinite(us)]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"skip {skip:.0%}")
    axes.set(title="Growth", xlabel="tokens", ylabel="microseconds per kept pair")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.legend(frameon=False)
