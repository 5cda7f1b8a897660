"""The two stages of training: the vision tower alone, then the whole model."""

import logging
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from demo_model.optim import build_optimizers
from demo_model.packing import PackedBatch, Packer, visual_token_targets
from torch import Tensor, nn
from transformers import ProcessorMixin, Qwen3VLMoeForConditionalGeneration

from modes_fx.demo.canvas import CELLS, COLOURS, draw
from modes_fx.demo.data import IGNORED, make_samples
from modes_fx.demo.questions import EMPTY

logger = logging.getLogger(__name__)

MUON_LR, ADAMW_LR = 0.012, 3e-3
IMAGES_PER_STEP, QUESTIONS_PER_IMAGE = 12, 8
VISION_IMAGES_PER_STEP = 24
BALANCE_WEIGHT = 0.02
# Both optimizers take steps of full size however weak the gradient: while the language model cannot look anything up
# yet, they would walk the tower off what it has learned, and digits were never found again.
FROZEN_TOWER_STEPS, TOWER_SCALE = 250, 0.3
WARM_UP_STEPS, FLAT_SHARE = 20, 0.3
CLIP_NORM = 1.0


def train_vision(model: Qwen3VLMoeForConditionalGeneration, processor: ProcessorMixin, steps: int, seed: int) -> list[float]:
    """Teach the vision tower to name digit, colour and cell under each visual token, in the language model's own words.

    The words for digits and colours are rows of the output head, those for cells rows of the input embedding: so an
    image's tokens start out close to the words that questions use for them, and to the words that answer. Without this
    stage the whole model sits on a plateau for hundreds of steps: it would have to find what to see and how to look it
    up at once.

    Returns:
        The loss of every step.
    """
    words = {"digit": [*map(str, range(10)), EMPTY], "colour": [*COLOURS, EMPTY], "cell": list(CELLS)}
    ids = {name: torch.tensor(processor.tokenizer.convert_tokens_to_ids(row)) for name, row in words.items()}
    tower = nn.ModuleDict({"visual": model.model.visual, "embed": model.get_input_embeddings(), "lm_head": model.lm_head})
    optimizers = build_optimizers(tower, MUON_LR, ADAMW_LR)
    losses = []
    for step in range(steps):
        rng = np.random.default_rng([seed, step])
        canvases = [draw("train", rng) for _ in range(VISION_IMAGES_PER_STEP)]
        images = processor.image_processor([canvas.image for canvas in canvases], return_tensors="pt")
        features_TH = model.model.visual(images["pixel_values"], images["image_grid_thw"]).pooler_output
        features_TH = F.rms_norm(features_TH, features_TH.shape[1:])
        loss = features_TH.new_zeros(())
        for name, target_T in visual_token_targets(canvases).items():
            table = tower["embed" if name == "cell" else "lm_head"].weight
            loss = loss + F.cross_entropy(features_TH @ table[ids[name]].T, target_T)
        losses.append(_update(loss, tower, optimizers, step, steps))
        if step % 100 == 99:
            logger.info("vision step %d: loss %.3f", step + 1, np.mean(losses[-100:]))
    return losses


def train_whole(
    model: Qwen3VLMoeForConditionalGeneration,
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
    packer = Packer(processor)
    optimizers = build_optimizers(model, MUON_LR, ADAMW_LR, TOWER_SCALE)
    router_logits: list[Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _module, _inputs, outputs: router_logits.append(outputs[0]))
        for layer in model.model.language_model.layers
    ]
    losses, balances, started = [], [], time.monotonic()
    for step in range(steps):
        model.model.visual.requires_grad_(step >= FROZEN_TOWER_STEPS)
        samples = make_samples("train", IMAGES_PER_STEP, seed * 1_000_000 + step, QUESTIONS_PER_IMAGE)
        groups = [samples[i : i + QUESTIONS_PER_IMAGE] for i in range(0, len(samples), QUESTIONS_PER_IMAGE)]
        batch = packer.pack(groups)
        router_logits.clear()
        answer_loss = _answer_loss(model, batch)
        top_k = model.config.text_config.num_experts_per_tok
        balance = balance_loss(router_logits, batch.is_real.flatten(), top_k)
        _update(answer_loss + BALANCE_WEIGHT * balance, model, optimizers, step, steps)
        losses.append(answer_loss.item())
        balances.append(balance.item() / len(router_logits))
        if step % 50 == 49:
            seconds = (time.monotonic() - started) / (step + 1)
            logger.info(
                "step %d: loss %.3f, balance %.3f, %.2f s a step",
                *(step + 1, np.mean(losses[-50:]), np.mean(balances[-50:]), seconds),
            )
        if (step + 1) % every == 0 and step + 1 < steps:
            model.eval()
            report(step + 1, losses)
            model.train()
    for hook in hooks:
        hook.remove()
    return losses


def _answer_loss(model: Qwen3VLMoeForConditionalGeneration, batch: PackedBatch) -> Tensor:
    """Mean cross-entropy over the answers' tokens; the head runs on those positions only."""
    hidden_BSH = model.model(**batch.inputs, use_cache=False).last_hidden_state
    is_answer_BS = batch.labels != IGNORED
    return F.cross_entropy(model.lm_head(hidden_BSH[is_answer_BS]), batch.labels[is_answer_BS])


def balance_loss(router_logits: list[Tensor], is_real_T: Tensor, top_k: int) -> Tensor:
    """Load balance, E sum_e P_e f_e (Fedus et al., Switch Transformer, equations 4-6), summed over layers.

    The library's helper balances the sum of all layers, which lets one layer's neglected expert hide behind another's
    favourite. A layer of uniform load contributes 1.
    """
    total = router_logits[0].new_zeros(())
    for logits_TE in router_logits:
        probabilities_TE = logits_TE[is_real_T].softmax(-1)
        n_experts = probabilities_TE.shape[1]
        chosen = probabilities_TE.topk(top_k, dim=-1).indices.flatten()
        share_E = torch.bincount(chosen, minlength=n_experts) / chosen.numel()
        total = total + n_experts * (probabilities_TE.mean(0) * share_E).sum()
    return total


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
