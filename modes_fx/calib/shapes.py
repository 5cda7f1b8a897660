"""Batches of few shapes, for where each new shape costs more than some padding: a compilation, or a CUDA graph.

Sequences are padded behind their end: nothing real attends to what follows it, and padding is masked, skipped and not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from modes_fx.data.batch import IGNORED, Batch

_MOST_LONGER = 1.25
_PLACED = ("position_ids", "cache_position")  # not known to be by token in dimension 1


def in_few_shapes(batches: Sequence[Batch]) -> list[Batch]:
    """Pad batches to the longest one's length, or one that is at most a quarter longer than their own.

    Args:
        batches: With ``labels`` [B, S]; what else has this shape is padded with it, ``input_ids`` with the row's last token,
            which nobody sees there. Batches with positions or masks of another form stay as they are.

    Returns:
        The batches, in order.
    """
    lengths: dict[int, int] = {}
    longest = 0
    for length in sorted({batch["labels"].shape[1] for batch in batches if _can_be_longer(batch)}, reverse=True):
        longest = longest if length * _MOST_LONGER >= longest > 0 else length
        lengths[length] = longest
    return [_longer(batch, lengths[batch["labels"].shape[1]]) if _can_be_longer(batch) else batch for batch in batches]


def _can_be_longer(batch: Batch) -> bool:
    mask = batch.get("attention_mask")
    return not any(name in batch for name in _PLACED) and (mask is None or mask.shape == batch["labels"].shape)


def _longer(batch: Batch, length: int) -> Batch:
    labels: Tensor = batch["labels"]
    missing = length - labels.shape[1]
    if not missing:
        return batch
    given = {"attention_mask": torch.ones_like(labels), **batch}
    return {name: _padded(name, value, labels.shape, missing) for name, value in given.items()}


def _padded(name: str, value: Any, shape: torch.Size, missing: int) -> Any:
    if not isinstance(value, Tensor) or value.shape[:2] != shape:
        return value
    if name == "input_ids":
        return torch.cat([value, value[:, -1:].expand(-1, missing)], dim=1)
    return pad(value, (0, 0) * (value.dim() - 2) + (0, missing), value=IGNORED if name == "labels" else 0)
