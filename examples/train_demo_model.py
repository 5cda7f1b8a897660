"""Train the embedded demo model from scratch: about 20 minutes on one CPU thread.

    python examples/train_demo_model.py --out /tmp/demo-model

This very command made `modes_fx/demo/checkpoint`. OUT holds the latest checkpoint throughout, and `training_log.json`.
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
from demo_model.architecture import build_model, build_processor
from demo_model.evaluate import accuracy_by_kind
from demo_model.experts import use_blocked_experts
from demo_model.hub_form import to_hub_form
from demo_model.train import train_vision, train_whole
from torch import nn
from transformers import ProcessorMixin, Qwen3VLMoeForConditionalGeneration

from modes_fx.demo.data import make_samples
from modes_fx.demo.questions import KINDS
from modes_fx.files.writing import check_writable

logger = logging.getLogger("train_demo_model")

LOG = "training_log.json"


def save(model: nn.Module, processor: ProcessorMixin, log: dict, out: Path) -> None:
    """Write bfloat16 weights, configs, tokenizer, processor and log, then put them at `out` in one move."""
    check_is_ours(out)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as folder:
        staging = Path(folder) / "checkpoint"
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(staging)  # which also notes the dtype in the config
        processor.save_pretrained(staging)
        to_hub_form(staging)
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vision-steps", type=int, default=600, help="steps of the vision tower alone")
    parser.add_argument("--steps", type=int, default=1000, help="steps of the whole model")
    parser.add_argument("--every", type=int, default=150, help="steps between evaluations")
    args = parser.parse_args()
    check_is_ours(args.out)  # now, not when the work is done
    check_writable(args.out, folder=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)  # also what makes a run repeat itself exactly
    torch.manual_seed(args.seed)
    started = time.monotonic()
    processor = build_processor()
    model = build_model(processor).train()
    use_blocked_experts(model)
    log = {
        "seed": args.seed,
        "vision_steps": args.vision_steps,
        "steps": args.steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "validation": {},
    }
    validation = make_samples("validation", 40, args.seed, len(KINDS))

    def report(step: int, losses: list[float]) -> None:
        accuracy = accuracy_by_kind(model, processor, validation)
        log["validation"][step] = {kind: score["accuracy"] for kind, score in accuracy.items()}
        log["losses"], log["seconds"] = thin(losses), round(time.monotonic() - started)
        logger.info("step %d, validation: %s", step, log["validation"][step])
        save(model, processor, log, args.out)

    log["vision_losses"] = thin(train_vision(model, processor, args.vision_steps, args.seed), 20)
    report(args.steps, train_whole(model, processor, args.steps, args.seed, args.every, report))

    stored = Qwen3VLMoeForConditionalGeneration.from_pretrained(args.out, dtype=torch.bfloat16).eval()
    log["test_bfloat16"] = accuracy_by_kind(stored, processor, make_samples("test", 200, 0, len(KINDS)))
    log["validation_bfloat16"] = accuracy_by_kind(stored, processor, validation)
    log["seconds"] = round(time.monotonic() - started)
    save(model, processor, log, args.out)
    logger.info("test, bfloat16: %s; %d s", log["test_bfloat16"], log["seconds"])


if __name__ == "__main__":
    main()
