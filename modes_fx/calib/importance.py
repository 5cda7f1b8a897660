"""Global importance of each MoE layer: the alpha of globally-modulated local gating (MoDES, arXiv 2511.15690)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from modes_fx.calib.objective import Batch, Objective, optimized
from modes_fx.errors import CalibrationError
from modes_fx.modality import MODALITIES

Mode = Literal["reference", "paper"]


@dataclass(frozen=True)
class Importance:
    """How much the output changes when a layer's routed experts are skipped.

    Attributes:
        alpha: For each MoE layer (text, vision), >= 0; each column sums to 1.
        kl: The same before normalisation: mean KL(unskipped || skipped) on answer tokens, in nats.
        mode: ``"reference"`` skips a layer for one modality at a time, ``"paper"`` for all tokens at once.
        answer_tokens: Answer tokens measured on.
    """

    alpha: tuple[tuple[float, float], ...]
    kl: tuple[tuple[float, float], ...]
    mode: Mode
    answer_tokens: int


def layer_importance(
    model: nn.Module,
    batches: Iterable[Batch],
    mode: Mode = "reference",
    *,
    on_step: Callable[[int, int], None] | None = None,
) -> Importance:
    """Measure the importance of every MoE layer.

    Runs 1 + L (paper) or 1 + 2L (reference) passes over the batches; a skipped layer is a threshold of +inf, so each pass
    runs compiled and computes less than the whole model.

    Args:
        model: A model that ``modes_fx.optimize`` takes, optimised or not.
        batches: Forward arguments with ``labels``; see ``Objective``.
        mode: See ``Importance``.
        on_step: Called with (passes done, passes in all).

    Raises:
        CalibrationError: Unknown mode or unusable batches.
    """
    if mode not in ("reference", "paper"):
        raise CalibrationError(f"Unknown mode {mode!r}; known: reference, paper.")
    with optimized(model):
        objective = Objective(model, batches)
        columns = [(0, 1)] if mode == "paper" else [(0,), (1,)]
        total = len(columns) * objective.num_layers
        kl = torch.zeros(objective.num_layers, len(MODALITIES), dtype=torch.float64)
        for done in range(total):
            layer, skipped = done // len(columns), list(columns[done % len(columns)])
            bounds = torch.zeros(objective.num_layers, len(MODALITIES))
            bounds[layer, skipped] = math.inf
            kl[layer, skipped] = objective.evaluate(bounds).kl
            if on_step is not None:
                on_step(done + 1, total)
    # A modality that is absent from the data, or has no influence, has no layer above another.
    sums = kl.sum(dim=0)
    alpha = torch.where(sums > 0, kl / sums, torch.full_like(kl, 1 / objective.num_layers))
    return Importance(_rows(alpha), _rows(kl), mode, objective.answer_tokens)


def _rows(table: torch.Tensor) -> tuple[tuple[float, float], ...]:
    return tuple((float(text), float(vision)) for text, vision in table)
