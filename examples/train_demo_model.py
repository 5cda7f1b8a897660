"""Train the embedded demo model, or one with another router or for a harder job: 20 to 45 minutes on one CPU thread.

    python examples/train_demo_model.py --out /tmp/demo-model
    python examples/train_demo_model.py --architecture deepseek_v3 --job pairs --out out/deepseek_v3

The first made `modes_fx/demo/checkpoint`. OUT holds the latest checkpoint throughout, and `training_log.json`;
`make_demo_data.py` writes a job's questions to calibrate and measure on.
"""

import argparse
import copy
import json
import logging
import shutil
import tempfile
import time
from pathlib import Path

import torch
from demo_model.architectures import ARCHITECTURES, Architecture
from demo_model.evaluate import accuracy_by_kind
from demo_model.jobs import JOBS, Asked, Job
from demo_model.train import train_vision, train_whole
from torch import nn
from transformers import ProcessorMixin

from modes_fx.files.writing import check_writable
from modes_fx.models.loading import load

logger = logging.getLogger("train_demo_model")

LOG = "training_log.json"


def save(architecture: Architecture, model: nn.Module, processor: ProcessorMixin, log: dict, out: Path) -> None:
    """Write bfloat16 weights, configs, tokenizer, processor and log, then put them at `out` in one move."""
    check_is_ours(out)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as folder:
        staging = Path(folder) / "checkpoint"
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(staging)  # which also notes the dtype in the config
        processor.save_pretrained(staging)
        architecture.to_hub_form(staging)
        (staging / LOG).write_text(json.dumps(log, indent=1) + "\n")
        for file in staging.iterdir():
            file.chmod(0o644)  # safetensors' own files are readable by their owner only
        shutil.rmtree(out, ignore_errors=True)
        staging.rename(out)


def check_is_ours(out: Path) -> None:
    """Refuse to put a checkpoint in the place of anything but a checkpoint of this script, or an empty folder."""
    if out.exists() and not (out / LOG).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise SystemExit(f"{out} exists and is no checkpoint of this script (it has no {LOG}): name another folder as --out.")


def thin(losses: list[float], n_points: int = 100) -> list[float]:
    """Means of consecutive stretches: enough of a curve for a log."""
    width = max(1, len(losses) // n_points)
    return [round(sum(losses[i : i + width]) / width, 4) for i in range(0, len(losses) - width + 1, width)]


def main() -> None:
    """Train, save, and evaluate the saved checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--architecture", choices=list(ARCHITECTURES), default="qwen3_vl_moe")
    parser.add_argument("--job", choices=list(JOBS), default="grid", help="pairs trains the grid's too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--vision-steps",
        type=int,
        help="steps of the vision tower alone; 600 or 1000 by architecture for each picture of the job if left out",
    )
    parser.add_argument(
        "--steps", type=int, help="steps of the whole model: 1000, or 2000 to 3000 by architecture for pairs, if left out"
    )
    parser.add_argument("--every", type=int, default=150, help="steps between evaluations")
    args = parser.parse_args()
    check_is_ours(args.out)  # now, not when the work is done
    check_writable(args.out, folder=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)  # also what makes a run repeat itself exactly
    torch.manual_seed(args.seed)
    started = time.monotonic()
    architecture, job = ARCHITECTURES[args.architecture], JOBS[args.job]
    steps = architecture.steps[job.name] if args.steps is None else args.steps
    vision_steps = architecture.vision_steps * len(job.image_names) if args.vision_steps is None else args.vision_steps
    processor = architecture.build_processor(job)
    model = architecture.build_model(processor, job).train()
    language = model.model.language_model
    language.set_experts_implementation(architecture.experts_implementation)
    language.set_attn_implementation(architecture.attention_implementation)
    log = {
        "architecture": architecture.name,
        "job": job.name,
        "seed": args.seed,
        "vision_steps": vision_steps,
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "validation": {},
    }
    trained_for = [JOBS["grid"]] if job.name == "grid" else [JOBS["grid"], job]
    validation = {each.name: _questions(each, "validation", 40, args.seed) for each in trained_for}

    def accuracy(network: nn.Module, questions: dict[str, list[Asked]]) -> dict:
        return _of_one({name: accuracy_by_kind(network, processor, asked) for name, asked in questions.items()})

    def report(step: int, losses: list[float]) -> None:
        found = {name: accuracy_by_kind(model, processor, asked) for name, asked in validation.items()}
        right = {name: {kind: score["accuracy"] for kind, score in each.items()} for name, each in found.items()}
        log["validation"][step] = _of_one(right)
        log["losses"], log["seconds"] = thin(losses), round(time.monotonic() - started)
        logger.info("step %d, validation: %s", step, log["validation"][step])
        save(architecture, model, processor, log, args.out)

    log["vision_losses"] = thin(train_vision(architecture, job, model, processor, vision_steps, args.seed), 20)
    report(steps, train_whole(architecture, job, model, processor, steps, args.seed, args.every, report))

    # The weights as stored; computed in float32: some processors take three times as long in bfloat16.
    stored, _ = load(str(args.out), dtype="float32", processor=processor)
    log["test_bfloat16"] = accuracy(stored, {each.name: _questions(each, "test", 200, 0) for each in trained_for})
    log["validation_bfloat16"] = accuracy(stored, validation)
    log["seconds"] = round(time.monotonic() - started)
    save(architecture, model, processor, log, args.out)
    logger.info("test, weights in bfloat16: %s; %d s", log["test_bfloat16"], log["seconds"])


def _of_one(by_job: dict[str, dict]) -> dict:
    """A model of one job has its numbers by kind alone."""
    return next(iter(by_job.values())) if len(by_job) == 1 else by_job


def _questions(job: Job, split: str, n_groups: int, seed: int) -> list[Asked]:
    return [asked for group in job.groups(split, n_groups, seed, len(job.kinds)) for asked in group]


if __name__ == "__main__":
    main()
