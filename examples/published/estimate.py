"""What a run will take: memory from the model's config, time from a few forwards and questions on the real model."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modes_fx.models.meta_model import build_on_meta, read_config

CALIBRATION_TOKENS = 4096
"""Tokens of a calibration sample, generously: InternVL cuts an image into at most 13 tiles of 256."""

QUESTION_TOKENS = 32768
"""Tokens of a question, generously: 32 frames, each of as many tokens as a model gives one (InternVL 768)."""

_SPARE = 0.08  # of each GPU: CUDA itself, fragments, the graphs of compiled blocks


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPUs.

    Attributes:
        weights: All parameters, in the dtype they are stored in.
        cache: Keys and values of the longest batch.
        activations: What one layer's forward of it has at a time, or the logits where there are more.
    """

    weights: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.activations


def memory(name: str, batch_size: int, eval_batch_size: int, *, trust_remote_code: bool) -> Memory:
    """Estimate memory from a model's config alone: it is built without weights.

    Keys and values take layers x 2 x heads x head size a token, latent ones less. Experts' rows, K x (3 I + 2 H) a token, are
    the widest of a layer's activations; beside them are a few rows of width H. Logits are those of the answers, which are few,
    but for models that give them for whole prompts, as older code does (in float32).

    Args:
        name: A folder, or the id of a hub model.
        batch_size: Samples a batch of calibration and search.
        eval_batch_size: Questions a batch of the evaluation.
        trust_remote_code: Whether Python code that comes with the model may run.

    Raises:
        ModelError: There is no such model, or it cannot be built.
    """
    config = read_config(name, trust_remote_code=trust_remote_code)
    model = build_on_meta(config, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    size = next(model.parameters()).itemsize
    tokens = max(batch_size * CALIBRATION_TOKENS, eval_batch_size * QUESTION_TOKENS)
    hidden, top_k = text.hidden_size, text.num_experts_per_tok
    few_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
    logits = 0 if few_logits else 4 * text.vocab_size * batch_size * CALIBRATION_TOKENS
    width = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    return Memory(
        weights=sum(weight.numel() * weight.itemsize for weight in (*model.parameters(), *model.buffers())),
        cache=size
        * tokens
        * text.num_hidden_layers
        * _cached_a_token(text, type(model).__module__.startswith("transformers.")),
        activations=max(size * tokens * (top_k * (3 * width + 2 * hidden) + 8 * hidden), logits),
    )


def _cached_a_token(text: Any, of_transformers: bool) -> int:
    """Return how many numbers a layer's cache holds for a token."""
    if not getattr(text, "kv_lora_rank", None):
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return int(2 * text.num_key_value_heads * head)
    if of_transformers:
        return int(text.kv_lora_rank + text.qk_rope_head_dim)
    # The code that comes with DeepSeek's and Kimi's weights keeps what it makes of these for each head.
    return int(text.num_attention_heads * (text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim))


@dataclass(frozen=True)
class Placement:
    """How the devices are used.

    Attributes:
        copies: Models at a time, each in a process of its own.
        spread: Whether the one model takes all GPUs together.
        gpus: What ``CUDA_VISIBLE_DEVICES`` is to each copy; () on the CPU.
    """

    copies: int
    spread: bool
    gpus: tuple[str, ...]


def placement(needed: int, sizes: Sequence[int], host: int, visible: str | None = None) -> Placement:
    """Give each GPU a copy where one holds the model, else spread one over all; without any, take the CPU.

    Args:
        needed: Bytes for a copy.
        sizes: Bytes of each GPU.
        host: Bytes of this machine's own memory, for the CPU.
        visible: ``CUDA_VISIBLE_DEVICES``.

    Raises:
        MemoryError: It fits nowhere.
    """
    names = visible.split(",") if visible else [str(index) for index in range(len(sizes))]
    room = [int(size * (1 - _SPARE)) for size in sizes]
    if sizes and needed <= min(room):
        return Placement(len(sizes), False, tuple(names))
    if sizes and needed <= sum(room):
        return Placement(1, True, (",".join(names),))
    if not sizes and needed <= host:
        return Placement(1, False, ())
    found = f"{len(sizes)} GPUs with {gigabytes(sum(room))} to use" if sizes else f"no GPU, and {gigabytes(host)} of memory"
    raise MemoryError(
        f"{gigabytes(needed)} are needed, and here is {found}. Take more or larger GPUs, a smaller --batch-size or "
        "--eval-batch-size, or a folder with a smaller model of the kind as --weights."
    )


def found_here() -> tuple[list[int], int, str | None]:
    """Return bytes of each GPU, bytes of this machine's memory, and ``CUDA_VISIBLE_DEVICES``."""
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    return sizes, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), os.environ.get("CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Pilot:
    """What was measured on the real model before the run.

    Attributes:
        samples: Of the calibration data, as many as there are and were asked for.
        forward_s: Seconds of one forward of a calibration batch, stock.
        layers: MoE layers.
        question_s: Seconds a question, by benchmark.
        questions: How many questions each has.
    """

    samples: int
    forward_s: float
    layers: int
    question_s: Mapping[str, float]
    questions: Mapping[str, int]


def hours(pilot: Pilot, *, batch_size: int, targets: int, gammas: int, grid_size: int, copies: int) -> dict[str, float]:
    """Return hours for each step, at most for the first two, whose forwards are taken to be as slow as stock's.

    Calibration takes 1 + 2 L forwards of each batch where none can be resumed, half of that where they can. The search takes
    at most targets x 2 D points for each gamma and a third more near the targets; far fewer, as a rule.
    """
    batches_each = -(-pilot.samples // (batch_size * copies))
    questions = sum(pilot.question_s[name] * count for name, count in pilot.questions.items())
    seconds = {
        "calibrate, at most": batches_each * (1 + 2 * pilot.layers) * pilot.forward_s,
        "search, at most": batches_each * gammas * targets * 2 * grid_size * 4 / 3 * pilot.forward_s,
        "evaluate": questions * (1 + targets) / copies,
    }
    return {name: value / 3600 for name, value in seconds.items()}


def gigabytes(size: float) -> str:
    """Write bytes as GB, or MB where that says more."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
