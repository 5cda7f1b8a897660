"""A batch: what a model takes, and the labels of its answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modes_fx.errors import CalibrationError

IGNORED = -100
Batch = Mapping[str, Any]


def beginning_of_answers(labels: Tensor) -> int:
    """Return where the first answer of a batch begins, by its labels, int64 [B, S]."""
    return int((labels != IGNORED).any(dim=0).nonzero()[0])


def prompts_of(batch: Batch, device: torch.device) -> Mapping[str, Tensor]:
    """Return the prompts of a batch, padded on the left: each sample whole, up to where its answer begins.

    Tensors of tokens, [B, S, ...], come back as [B, P, ...], where P is the longest prompt's length; those of pictures as they
    are. With ``attention_mask``, int64 [B, P], whether the batch has one or not.

    Raises:
        CalibrationError: No sample has anything before its answer.
    """
    labels = batch["labels"].cpu()
    answers = labels != IGNORED
    ends = torch.where(answers.any(dim=1), answers.int().argmax(dim=1), labels.shape[1])
    sources = torch.arange(labels.shape[1])[None] - (labels.shape[1] - ends)[:, None]  # of each place, once all end together
    mask = batch.get("attention_mask", torch.ones_like(labels)).cpu().gather(1, sources.clamp(min=0)) * (sources >= 0)
    if not mask.any():
        raise CalibrationError("The batch holds no prompt: its labels say that all of its tokens are answers.")
    first = int(mask.any(dim=0).nonzero()[0])
    sources = sources[:, first:].clamp(min=0)
    rows = torch.arange(len(labels))[:, None]
    prompts = {key: value[rows, sources] if value.shape[:2] == labels.shape else value for key, value in _inputs(batch)}
    return {key: value.to(device) for key, value in {**prompts, "attention_mask": mask[:, first:]}.items()}


def before_answers(batch: Batch, device: torch.device) -> Mapping[str, Tensor]:
    """Return a batch without labels, cut where the first answer of it begins."""
    first = beginning_of_answers(batch["labels"])
    whole = batch["labels"].shape
    return {key: (value[:, :first] if value.shape[:2] == whole else value).to(device) for key, value in _inputs(batch)}


def _inputs(batch: Batch) -> list[tuple[str, Tensor]]:
    return [(key, value) for key, value in batch.items() if key != "labels" and isinstance(value, Tensor)]
