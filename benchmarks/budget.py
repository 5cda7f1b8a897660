"""Fixed thresholds against input-adaptive ones on the embedded model: each input's own skip ratio, and the loss.

    python benchmarks/budget.py [--inputs 64] [--targets 0.5,0.75,0.875] [--plan FILE] [--threads 2] [--json FILE]

Each input is a prefill of its own: questions of the test split as they are; with the question said six times, so that there
is more text than in calibration; and with three images. For every input the share of dropped (token, expert) pairs is compared
with the target. The plan is calibrated and searched as ``modes-fx demo`` does, or read from FILE where that exists (it is
written there otherwise).

Columns: the mean over inputs of the skip ratio, of its distance to the target, and its standard deviation; the mean
KL(unskipped || skipped) on answer tokens in nats; milliseconds of a prefill, median over inputs, fixed and budget in turn.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import modes_fx
from modes_fx.calib import Objective, layer_importance, search
from modes_fx.demo import load, make_batches, make_samples
from modes_fx.demo.data import IGNORED, Sample
from modes_fx.files.writing import write_atomically
from modes_fx.measure.demo.run import Size
from modes_fx.optimize import optimized_state
from modes_fx.plan import SkipPlan

Batch = dict[str, Any]
MODES = ("fixed", "budget")
KINDS = {"as calibrated": (1, 1), "question x 6": (1, 6), "3 images": (3, 1)}  # images, repeats of the question


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=64)
    parser.add_argument("--targets", default="0.5,0.75,0.875")
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, processor = load()
    modes_fx.optimize(model)
    targets = [float(target) for target in options.targets.split(",")]
    plan = searched_plan(model, processor, targets, options.plan)
    samples = make_samples("test", -(-options.inputs // 8))[: options.inputs]
    rows = [row for kind in KINDS for row in _rows(model, plan, targets, kind, _inputs(samples, processor, *KINDS[kind]))]
    headers = ["inputs", "target", "thresholds", "skipped", "distance", "deviation", "KL, nats", "ms"]
    print(tabulate([row.values() for row in rows], headers=headers, floatfmt=("", "", "", ".3f", ".3f", ".3f", ".1e", ".1f")))
    if options.json is not None:
        write_atomically(options.json, json.dumps(rows, indent=2) + "\n")


def searched_plan(model: Any, processor: Any, targets: Sequence[float], path: Path | None) -> SkipPlan:
    """Return the plan in a file, or search for one as ``modes-fx demo`` does and write it there."""
    if path is not None and path.exists():
        return SkipPlan.load(path)
    size = Size()
    calibration = make_batches("calibration", size.calibration_images, processor)
    plan = search(model, calibration, layer_importance(model, calibration), targets, grid_size=size.grid_size)
    if path is not None:
        plan.save(path)
    return plan


def _rows(model: Any, plan: SkipPlan, targets: Sequence[float], kind: str, inputs: Sequence[Batch]) -> list[dict[str, Any]]:
    objectives = [Objective(model, [batch]) for batch in inputs]
    tokens = [objective.answer_tokens for objective in objectives]
    rows = []
    for target in targets:
        plans = {mode: replace(plan, mode=mode) for mode in MODES}
        ms = _milliseconds(model, plans, target, inputs)
        for mode in MODES:
            modes_fx.set_plan(model, plans[mode], target)
            found = [objective.evaluate(optimized_state(model).runtime.bounds_in_force) for objective in objectives]
            ratios = [evaluation.skip_ratio for evaluation in found]
            rows.append(
                {
                    "inputs": kind,
                    "target": target,
                    "thresholds": mode,
                    "skipped": statistics.fmean(ratios),
                    "distance": statistics.fmean(abs(ratio - target) for ratio in ratios),
                    "deviation": statistics.stdev(ratios),
                    "kl": sum(evaluation.kl * count for evaluation, count in zip(found, tokens, strict=True)) / sum(tokens),
                    "ms": statistics.median(ms[mode]),
                }
            )
    return rows


def _milliseconds(model: Any, plans: Mapping[str, SkipPlan], target: float, inputs: Sequence[Batch]) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {mode: [] for mode in plans}
    for batch in inputs:
        arguments = {key: value for key, value in batch.items() if key != "labels"}
        for mode, plan in plans.items():
            modes_fx.set_plan(model, plan, target)
            with torch.no_grad():
                model(**arguments, use_cache=False)
                started = time.perf_counter()
                model(**arguments, use_cache=False)
            taken[mode].append((time.perf_counter() - started) * 1e3)
    return taken


def _inputs(samples: Sequence[Sample], processor: Any, images: int, repeats: int) -> list[Batch]:
    """Return one batch of one prompt, with its answer, for each sample; further images are those of other samples."""
    batches = []
    for index, sample in enumerate(samples):
        shown = [samples[(index + 8 * other) % len(samples)].image for other in reversed(range(images))]
        question = " ".join([sample.question] * repeats)
        content = [*({"type": "image"} for _ in shown), {"type": "text", "text": question}]
        prompt = [{"role": "user", "content": content}]
        answer = {"role": "assistant", "content": [{"type": "text", "text": sample.answer}]}
        texts = [
            processor.apply_chat_template([prompt], tokenize=False, add_generation_prompt=True)[0],
            processor.apply_chat_template([[*prompt, answer]], tokenize=False)[0],
        ]
        batch = dict(processor(text=texts[1:], images=[shown], return_tensors="pt"))
        answer_ids = processor.tokenizer(texts[1].removeprefix(texts[0]).rstrip(), add_special_tokens=False)["input_ids"]
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
        batch["labels"][:, -len(answer_ids) :] = batch["input_ids"][:, -len(answer_ids) :]
        batches.append(batch)
    return batches


if __name__ == "__main__":
    main()
