"""A batch: what a model takes, and the labels of its answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
Batch = Mapping[str, Any]


def beginning_of_answers(labels: Tensor) -> int:
    """Return where the first answer of a batch begins, by its labels, int64 [B, S]."""
    return int((labels != IGNORED).any(dim=0).nonzero()[0])


def prompts_of(batch: Batch, device: torch.device) -> Mapping[str, Tensor]:
    """Return a batch without labels, cut where the first answer begins."""
    first = beginning_of_answers(batch["labels"])
    whole = batch["labels"].shape
    return {
        key: (value[:, :first] if value.shape[:2] == whole else value).to(device)
        for key, value in batch.items()
        if key != "labels" and isinstance(value, Tensor)
    }
