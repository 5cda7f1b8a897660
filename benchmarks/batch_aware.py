"""Batch-aware thresholds against plain ones at equal skip ratios: experts read, time of an MoE block, loss.

    python benchmarks/batch_aware.py [--tokens 64,512] [--skip 0.5,0.75,0.875] [--slack 0,0.25,0.5,0.75] [--threads 1]

One block of Qwen3-VL-30B-A3B (random weights, bfloat16), with the routing of a random router ("uniform") and of one whose
experts' popularity falls like 1 / rank ("zipf"). For each slack the threshold is what skips the given share of that very batch.
All slacks run once a round; medians of the CPU time (with one thread, as by default, the time it takes but for other
processes' turns), and the median over rounds of the ratio to the first slack.

The embedded model's loss: KL(unskipped || skipped) in nats on answer tokens of the test split, in batches of about as many
tokens. For each slack the plan's thresholds are multiplied by what makes these batches skip the given share. The plan is
calibrated and searched as ``modes-fx demo`` does, or read from the file of ``--plan`` where that exists (it is written there
otherwise). Experts read are a mean over layers and batches. "Without slack" is the loss of the same thresholds under the plain
rule, which reads the same experts and computes fewer pairs.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from budget import searched_plan
from tabulate import tabulate
from torch import Tensor, nn

import modes_fx
from modes_fx.calib import Evaluation, Objective
from modes_fx.demo import collate, load, make_samples
from modes_fx.files.writing import write_atomically
from modes_fx.measure.bench.models import Routing, Skew, block_of, build, draw, route
from modes_fx.measure.compare.tuning import Tuner
from modes_fx.measure.timing import in_turn
from modes_fx.models.device import cpu_name
from modes_fx.plan import PlanPoint, SkipPlan
from modes_fx.policies import RULES, decide
from modes_fx.policies.batch_threshold import slack_tables

PRESET = "qwen3-vl-30b-a3b"
RULE = "batch_threshold"
TOKENS_A_SAMPLE = 85  # of the embedded model's task
Row = dict[str, Any]


def block_plan(tau: float, slack: float, experts: int) -> SkipPlan:
    """Return the plan of a block: one threshold for all."""
    return SkipPlan((PlanPoint(None, tau, tau),), rule=RULE, tables=slack_tables(1, experts, slack))


def tuned(routing: Routing, slack: float, skip: float, experts: int) -> tuple[float, float, int]:
    """Return the threshold that skips the share ``skip`` of a batch, what it skips, and the experts it reads."""
    classes = torch.zeros(len(routing.ids), dtype=torch.int64)
    low, high, table = 0.0, 1.0, torch.full((experts,), slack)
    for _ in range(30):
        tau = (low + high) / 2
        keep, _ = decide(RULES[RULE].keep, routing.ids, routing.weights, classes, torch.tensor([tau]), table)
        skipped = 1 - float(keep.float().mean())
        low, high = (tau, high) if skipped < skip else (low, tau)
    return tau, skipped, len(routing.ids[keep].unique())


def time_block(counts: Sequence[int], skips: Sequence[float], slacks: Sequence[float], rounds: int) -> list[Row]:
    """Return one row for each routing, token count, skip ratio and slack."""
    rows: list[Row] = []
    skews: tuple[Skew, ...] = ("uniform", "zipf")
    for skew in skews:
        block = block_of(build(PRESET, 1, skew))
        experts = block.config.num_experts
        inputs = {count: draw(count, block.config.hidden_size, skew, seed=1) for count in counts}
        routings = {count: route(block, {"inputs_embeds": hidden})[0] for count, hidden in inputs.items()}
        modes_fx.optimize(block, block_plan(0.0, 0.0, experts))
        for count, skip in product(counts, skips):
            found = {slack: tuned(routings[count], slack, skip, experts) for slack in slacks}
            plans = {slack: block_plan(tau, slack, experts) for slack, (tau, *_) in found.items()}
            runners = {str(slack): partial(_milliseconds, block, plan, inputs[count]) for slack, plan in plans.items()}
            ms = in_turn(runners, rounds, warm_up=2)
            for slack, (_, skipped, read) in found.items():
                own, first = ms[str(slack)], ms[str(slacks[0])]
                row = {"routing": skew, "tokens": count, "slack": slack, "skipped": skipped, "experts": read}
                ratio = statistics.median(a / b for a, b in zip(own, first, strict=True))
                rows.append({**row, "KL, nats": None, "without slack": None, "ms": statistics.median(own), "x plain": ratio})
        modes_fx.restore(block)
    return rows


def _milliseconds(block: nn.Module, plan: SkipPlan, hidden: Tensor) -> float:
    modes_fx.set_plan(block, plan)
    started = time.process_time()
    block(hidden)
    return (time.process_time() - started) * 1e3


def _measure(objective: Objective, bounds: Tensor, scale: float) -> Evaluation:
    return objective.evaluate(bounds * scale)


def measure_loss(
    counts: Sequence[int], skips: Sequence[float], slacks: Sequence[float], plan_file: Path | None, images: int
) -> list[Row]:
    """Return one row for each token count, skip ratio and slack."""
    model, processor = load()
    modes_fx.optimize(model)
    plan = searched_plan(model, processor, skips, plan_file)
    samples = make_samples("test", images)
    layers, experts = len(plan.layers), model.config.text_config.num_experts
    tables = {slack: slack_tables(layers, experts, slack) for slack in slacks}
    rows = []
    modes_fx.optimize(model, replace(plan, rule=RULE, tables=tables[slacks[0]]))
    for count in counts:
        size = max(1, count // TOKENS_A_SAMPLE)
        batches = [collate(samples[start : start + size], processor) for start in range(0, len(samples), size)]
        objective = Objective(model, batches)
        for skip in skips:
            bounds = plan.bounds(layers, skip)
            for slack in slacks:
                modes_fx.set_plan(model, replace(plan, rule=RULE, tables=tables[slack]), skip)
                tuner = Tuner(partial(_measure, objective, bounds), tolerance=0.003)
                best = tuner.reach(skip)
                if best is None:
                    raise SystemExit(f"{skip:.0%} cannot be skipped with slack {slack:g}: leave one of them out.")
                with modes_fx.stats(model).experts_read() as read:
                    found = objective.evaluate(bounds * best.scale)
                modes_fx.set_plan(model, replace(plan, rule=RULE, tables=slack_tables(layers, experts, 0.0)), skip)
                row = {"routing": "demo model", "tokens": count, "slack": slack, "skipped": found.skip_ratio}
                row |= {"experts": statistics.fmean(experts for *_, experts in read), "KL, nats": found.kl}
                rows.append({**row, "without slack": objective.evaluate(bounds * best.scale).kl})
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="64,512")
    parser.add_argument("--skip", default="0.5,0.75,0.875")
    parser.add_argument("--slack", default="0,0.25,0.5,0.75", help="the first is what others are compared with")
    parser.add_argument("--images", type=int, default=8, help="of the test split, with 8 questions each")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    counts = [int(item) for item in options.tokens.split(",")]
    skips, slacks = ([float(item) for item in given.split(",")] for given in (options.skip, options.slack))
    with torch.inference_mode():
        rows = time_block(counts, skips, slacks, options.rounds)
    rows += measure_loss(counts, skips, slacks, options.plan, options.images)
    print(f"{options.threads} threads, {cpu_name()}, torch {torch.__version__}")
    print(tabulate(rows, headers="keys", floatfmt=("", "", "g", ".1%", ".1f", ".1e", ".1e", ".1f", ".2f")))
    if options.json:
        write_atomically(options.json, json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
