"""The two stages of training: the vision tower alone, then the whole model."""

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from demo_model.architectures import Architecture
from demo_model.balance import Balance
from demo_model.jobs import JOBS, Job
from demo_model.optim import build_optimizers
from demo_model.packing import PackedBatch, Packer, visual_token_targets
from torch import Tensor, nn
from transformers import ProcessorMixin

from modes_fx.demo.canvas import COLOURS
from modes_fx.demo.data import IGNORED
from modes_fx.demo.questions import EMPTY

logger = logging.getLogger(__name__)

MUON_LR, ADAMW_LR = 0.012, 3e-3
# Of each job, so that a step of either has about 2,700 tokens.
GROUPS_PER_STEP, QUESTIONS_PER_GROUP = {"grid": 12, "pairs": 6}, 8
VISION_IMAGES_PER_STEP = 24
# Both optimizers take steps of full size however weak the gradient: while the language model cannot look anything up
# yet, they would walk the tower off what it has learned, and digits were never found again.
FROZEN_TOWER_STEPS, TOWER_SCALE = 250, 0.3
# The harder job starts from the plainer one, and keeps a quarter of it: looking up a cell of one picture is learned first.
GRID_SHARE, GRID_EVERY = 0.2, 4
WARM_UP_STEPS, FLAT_SHARE = 20, 0.3
CLIP_NORM = 1.0


def train_vision(
    architecture: Architecture, job: Job, model: Any, processor: ProcessorMixin, steps: int, seed: int
) -> list[float]:
    """Teach the vision tower to name digit, colour and cell under each visual token, in the language model's own words.

    The words for digits and colours are rows of the output head, those for cells rows of the input embedding: so an
    image's tokens start out close to the words that questions use for them, and to the words that answer. Without this
    stage the whole model sits on a plateau for hundreds of steps: it would have to find what to see and how to look it
    up at once.

    Returns:
        The loss of every step.
    """
    words = {"digit": [*map(str, range(10)), EMPTY], "colour": [*COLOURS, EMPTY], "cell": list(job.cells)}
    ids = {name: torch.tensor(processor.tokenizer.convert_tokens_to_ids(row)) for name, row in words.items()}
    parts = {**architecture.tower(model), "embed": model.get_input_embeddings(), "lm_head": model.lm_head}
    tower = nn.ModuleDict(parts)
    optimizers = build_optimizers(tower, MUON_LR, ADAMW_LR)
    losses = []
    for step in range(steps):
        rng = np.random.default_rng([seed, step])
        places = [index % len(job.image_names) for index in range(VISION_IMAGES_PER_STEP)]
        canvases = [job.picture("train", rng, place) for place in places]
        images = processor.image_processor([canvas.image for canvas in canvases], return_tensors="pt")
        features_TH = architecture.visual_tokens(model, images)
        features_TH = F.rms_norm(features_TH, features_TH.shape[1:])
        loss = features_TH.new_zeros(())
        for name, target_T in visual_token_targets(canvases, places).items():
            table = tower["embed" if name == "cell" else "lm_head"].weight
            loss = loss + F.cross_entropy(features_TH @ table[ids[name]].T, target_T)
        losses.append(_update(loss, tower, optimizers, step, steps))
        if step % 100 == 99:
            logger.info("vision step %d: loss %.3f", step + 1, np.mean(losses[-100:]))
    return losses


def train_whole(
    architecture: Architecture,
    job: Job,
    model: Any,
    processor: ProcessorMixin,
    steps: int,
    seed: int,
    every: int,
    report: Callable[[int, list[float]], None],
) -> list[float]:
    """Train everything on packed questions.

    `report(steps done, losses so far)` is called after each `every` steps but the last.

    Returns:
        The loss of every step, without the balance term.
    """
    packer = Packer(model, processor)
    tower = architecture.tower(model)
    optimizers = build_optimizers(model, MUON_LR, ADAMW_LR, tower, TOWER_SCALE)
    balance = Balance(model)
    losses, loads, started = [], [], time.monotonic()
    for step in range(steps):
        for module in tower.values():
            module.requires_grad_(step >= FROZEN_TOWER_STEPS)
        now = _job_of(job, step, steps)
        groups = now.groups("train", GROUPS_PER_STEP[now.name], seed * 1_000_000 + step, QUESTIONS_PER_GROUP)
        batch = packer.pack(groups)
        answer_loss = _answer_loss(model, batch)
        uneven, load = balance.take(batch.is_real.flatten())
        _update(answer_loss + uneven, model, optimizers, step, steps)
        losses.append(answer_loss.item())
        loads.append(load)
        if step % 50 == 49:
            seconds = (time.monotonic() - started) / (step + 1)
            logger.info(
                "step %d: loss %.3f, balance %.3f, %.2f s a step",
                *(step + 1, np.mean(losses[-50:]), np.mean(loads[-50:]), seconds),
            )
        if (step + 1) % every == 0 and step + 1 < steps:
            model.eval()
            report(step + 1, losses)
            model.train()
    balance.remove()
    return losses


def _job_of(job: Job, step: int, steps: int) -> Job:
    return JOBS["grid"] if step < GRID_SHARE * steps or step % GRID_EVERY == 0 else job


def _answer_loss(model: Any, batch: PackedBatch) -> Tensor:
    """Mean cross-entropy over the answers' tokens; the head runs on those positions only."""
    hidden_BSH = model.model(**batch.inputs, use_cache=False).last_hidden_state
    is_answer_BS = batch.labels != IGNORED
    return F.cross_entropy(model.lm_head(hidden_BSH[is_answer_BS]), batch.labels[is_answer_BS])


def _update(loss: Tensor, module: nn.Module, optimizers: list[torch.optim.Optimizer], step: int, steps: int) -> float:
    """One step of all optimizers: warm-up, flat, then linear decay to zero."""
    loss.backward()
    rate = min(1.0, (step + 1) / WARM_UP_STEPS, (steps - step) / ((1 - FLAT_SHARE) * steps))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.setdefault("initial_lr", group["lr"])
    # Muon is blind to its gradients' scale, so only AdamW's need clipping.
    nn.utils.clip_grad_norm_([p for group in optimizers[1].param_groups for p in group["params"]], CLIP_NORM)
    for optimizer in optimizers:
        optimizer.step()
    module.zero_grad(set_to_none=True)
    return loss.item()
