"""Experts in 16, 8 and 4 bits x skip ratio, on the embedded model: answers, divergence, memory, speed.

One plan is searched for on the bfloat16 model and put on all of them. The divergence is that from the bfloat16 model that skips
nothing, so it holds what quantisation does and what skipping does. Speed is measured in turn, so that a busy moment of the
machine hits all alike; medians. Needs torchao (`pip install -e '.[quantise]'`).

    python benchmarks/quantised.py [--images 64] [--calibration-images 12] [--rounds 9] [--threads 2] [--json FILE]
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from transformers.utils import logging

import modes_fx
from modes_fx.calib import layer_importance, search
from modes_fx.calib.objective import Answers, divergence_of_rows
from modes_fx.demo import collate, load, make_batches, make_samples
from modes_fx.files.writing import write_atomically
from modes_fx.measure.demo.run import TARGETS
from modes_fx.models.device import cpu_name
from modes_fx.models.layers import find_moe_layers
from modes_fx.quantise import quantise_experts
from modes_fx.quantise.memory import weight_bytes

BITS = (16, 8, 4)
NEW_TOKENS = 24
BATCH = 32


def build(bits: int) -> nn.Module:
    """Return the embedded model in bfloat16, its experts in so many bits."""
    model = load()[0]
    return model if bits == 16 else quantise_experts(model, bits)


def batches(split: str, images: int) -> list[dict[str, Any]]:
    """Return questions with their answers."""
    return make_batches(split, images, load()[1], BATCH)


def find_plan(images: int) -> modes_fx.SkipPlan:
    """Calibrate and search on the bfloat16 model."""
    model, data = modes_fx.optimize(build(16)), batches("calibration", images)
    return search(model, data, layer_importance(model, data), TARGETS, grid_size=14)


def seconds(model: Any, inputs: Mapping[str, Tensor], new_tokens: int) -> float:
    """Time one call of generate."""
    started = time.perf_counter()
    model.generate(**inputs, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False)
    return time.perf_counter() - started


def answers(model: nn.Module, test: list[dict[str, Any]], reference: list[Tensor]) -> tuple[float, float]:
    """Return the share of right answers and the divergence from the reference, in nats."""
    given = [Answers(model)(batch) for batch in test]
    kl = sum(float(divergence_of_rows(wanted, logits).sum()) for wanted, (logits, _) in zip(reference, given, strict=True))
    right = torch.cat([correct for _, correct in given])
    return float(right.double().mean()), kl / sum(map(len, reference))


def measure(plan: modes_fx.SkipPlan, images: int, rounds: int) -> list[dict[str, Any]]:
    """Return one row for each width, stock and at each target."""
    test, prompts = batches("test", images), collate(make_samples("test", 1), load()[1], answers=False)
    reference = [Answers(build(16))(batch)[0] for batch in test]
    rows: list[dict[str, Any]] = []
    models: list[tuple[nn.Module, float | None]] = []
    for bits in BITS:
        stock, ours = build(bits), modes_fx.optimize(build(bits))
        found = modes_fx.report(ours)
        assert len(found.rewritten) == found.found
        size = weight_bytes(layer.experts for layer in find_moe_layers(ours))
        for target in ("stock", None, *plan.targets):
            model = stock if target == "stock" else ours
            row: dict[str, Any] = {"bits": bits, "target": target or 0.0, "skipped": 0.0}
            if target == "stock":
                row["correct"], row["kl"] = answers(model, test, reference)
            else:
                modes_fx.set_plan(ours, None if target is None else plan, target)
                with modes_fx.stats(ours).reset() as stats:
                    row["correct"], row["kl"] = answers(ours, test, reference)
                row["skipped"] = stats.skip_ratio()
            rows.append({**row, "experts_bytes": size})
            models.append((model, None if target == "stock" else target))
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in rows]
    for index in range(rounds + 2):
        for (model, target), (prefill, decode), row in zip(models, times, rows, strict=True):
            if row["target"] != "stock":
                modes_fx.set_plan(model, None if target is None else plan, target)
            first, more = seconds(model, prompts, 1), seconds(model, prompts, 1 + NEW_TOKENS)
            if index >= 2:
                prefill.append(first * 1e3)
                decode.append((more - first) / NEW_TOKENS * 1e3)
    for row, (prefill, decode) in zip(rows, times, strict=True):
        row["prefill_ms"], row["decode_ms"] = statistics.median(prefill), statistics.median(decode)
    return rows


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64, help="canvases of the test split, with 8 questions each")
    parser.add_argument("--calibration-images", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    rows = measure(find_plan(options.calibration_images), options.images, options.rounds)
    print(f"Embedded model, {8 * options.images} questions, {options.threads} threads, {cpu_name()}, torch {torch.__version__}")
    names = {"stock": "stock", 0.0: "all kept"}
    table = [
        [
            row["bits"], names.get(row["target"], f"target {row['target']}"), f"{row['skipped']:.1%}", f"{row['correct']:.1%}",
            f"{row['kl']:.1e}", f"{row['experts_bytes'] / 1e6:.2f}", f"{row['prefill_ms']:.1f}", f"{row['decode_ms']:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    headers = ["bits", "rule", "skipped", "correct", "KL, nats", "experts, MB", "prefill ms", "decode ms a token"]
    print(tabulate(table, headers=headers, disable_numparse=True, stralign="right"))
    if options.json:
        write_atomically(options.json, json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
