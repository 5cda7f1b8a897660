"""Global importance of each MoE layer: the alpha of globally-modulated local gating (MoDES, arXiv 2511.15690)."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn

from modes_fx.calib import processes
from modes_fx.calib.estimate import estimate
from modes_fx.calib.objective import Answers, divergence_of_rows, optimized
from modes_fx.calib.resume import Tape, mistrust
from modes_fx.data.batch import Batch
from modes_fx.errors import CalibrationError
from modes_fx.files.importance_fields import Method, Mode
from modes_fx.modality import MODALITIES

logger = logging.getLogger(__name__)

OnStep = Callable[[int, int], None]

_COLUMNS: dict[str, tuple[tuple[int, ...], ...]] = {"reference": ((0,), (1,)), "paper": ((0, 1),)}


@dataclass(frozen=True)
class Importance:
    """How much the output changes when a layer's routed experts are skipped.

    Attributes:
        alpha: For each MoE layer (text, vision), >= 0; each column sums to 1.
        kl: The same before normalisation: mean KL(unskipped || skipped) on answer tokens, in nats.
        mode: ``"reference"`` skips a layer for one modality at a time, ``"paper"`` for all tokens at once.
        answer_tokens: Answer tokens measured on, over all processes.
        method: How ``kl`` was found; ``"naive"`` also where it had to stand in for ``"resumed"``.
        forwards: What that cost on this process, in whole forwards over its data: MoE layers computed / MoE layers of one; a
            backward counts as a forward.
        seconds: What it cost in time, compilation included.
    """

    alpha: tuple[tuple[float, float], ...]
    kl: tuple[tuple[float, float], ...]
    mode: Mode
    answer_tokens: int
    method: Method = "naive"
    forwards: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("alpha", "kl"):
            for row in getattr(self, name):
                if len(row) != len(MODALITIES) or any(not math.isfinite(value) or value < 0 for value in row):
                    raise CalibrationError(f"{name} holds a (text, vision) pair of finite numbers >= 0 a layer, got {row!r}.")

    @classmethod
    def of(cls, kl: Tensor, mode: Mode, answer_tokens: int, method: Method, forwards: float, seconds: float) -> Importance:
        """Normalise float64 [L, 2] of divergences; the rest as in the attributes."""
        # A modality that is absent from the data, or has no influence, has no layer above another.
        by_modality = kl.sum(dim=0)
        alpha = torch.where(by_modality > 0, kl / by_modality, torch.full_like(kl, 1 / len(kl)))
        return cls(_rows(alpha), _rows(kl), mode, answer_tokens, method, forwards, seconds)


def layer_importance(
    model: nn.Module,
    batches: Iterable[Batch],
    mode: Mode = "reference",
    *,
    method: Method = "resumed",
    on_step: OnStep | None = None,
) -> Importance:
    """Measure the importance of every MoE layer.

    With several processes each has its own batches, and all get the same answer.

    Args:
        model: A model that ``modes_fx.optimize`` takes, optimised or not.
        batches: Forward arguments with ``labels``; see ``Objective``.
        mode: See ``Importance``. MoDES's code and its paper differ; the code's tells the modalities apart.
        method: ``"naive"`` runs 1 + L (paper) or 1 + 2L (reference) forwards of each batch; a skipped layer is a threshold of
            +inf: what the others are held against. ``"resumed"`` gives the same for half the work or less: each forward starts
            at the layer that it skips (``resume.Tape``); where a model does not allow that, found out on the first batch, it
            warns and goes on naively.
            ``"estimate"`` needs one forward and four backwards and is rough: on the embedded model its rank correlation with
            the measured importance is 0.69 for text and 0.98 for vision; see ``calib/estimate.py``.
        on_step: Called with (steps done, steps in all).

    Raises:
        CalibrationError: Unknown mode or method, or unusable batches.
    """
    for name, value, known in (("mode", mode, get_args(Mode)), ("method", method, get_args(Method))):
        if value not in known:
            raise CalibrationError(f"Unknown {name} {value!r}; known: {', '.join(known)}.")
    started, columns = time.monotonic(), _COLUMNS[mode]
    with optimized(model):
        data = Answers(model).ready(batches)
        logger.info("importance of each layer, on %d batches, %s", len(data), method)
        if method == "estimate":
            kl, tokens, forwards = estimate(model, data, columns, on_step=on_step)
        else:
            kl, tokens, forwards, method = _measure(model, data, columns, method, on_step)
    # Plain sums until here: one reduction serves any number of processes.
    *sums, total = processes.total(torch.tensor([*kl.flatten().tolist(), tokens], dtype=torch.float64)).tolist()
    if not total:
        raise CalibrationError("Calibration needs at least one batch.")
    kl = (torch.tensor(sums, dtype=torch.float64) / total).clamp(min=0).view(-1, len(MODALITIES))
    return Importance.of(kl, mode, int(total), method, forwards, time.monotonic() - started)


def _measure(
    model: nn.Module, data: Sequence[Batch], columns: Sequence[Sequence[int]], method: Method, on_step: OnStep | None
) -> tuple[Tensor, int, float, Method]:
    """Return the sums of KL by layer and modality, float64 [L, 2], and of answer tokens; forwards run; the method used."""
    answers, tokens, reason = Answers(model), 0, ""
    with Tape(model, blank=method == "naive") as tape:
        kl = torch.zeros(tape.num_layers, len(MODALITIES), dtype=torch.float64)
        losses: list[tuple[int, list[int], Tensor]] = []
        steps = [(layer, list(column)) for layer in range(tape.num_layers) for column in columns]
        for index, batch in enumerate(data):
            with tape.recording():
                reference, _ = answers(batch)
            tokens += len(reference)
            if index == 0 and method == "resumed":
                reason = _agreed(mistrust(tape, partial(_logits, answers, batch), reference))
                if reason:
                    break
            for done, (layer, column) in enumerate(steps, start=1 + index * len(steps)):
                if tape.concerns(layer, column):
                    with tape.resumed(layer, column):
                        losses.append(
                            (layer, column, divergence_of_rows(reference, answers(batch)[0]).sum(dtype=torch.float64))
                        )
                if on_step is not None:
                    on_step(done, len(data) * len(steps))
        for layer, column, loss in losses:  # read when all is on its way
            kl[layer, column] += float(loss)
        forwards = tape.regions_run / max(tape.num_regions * len(data), 1)
    if not data and method == "resumed":
        reason = _agreed("")
    if reason:
        logger.warning("%s is calibrated naively, each layer by whole forwards: %s", type(model).__name__, reason)
        kl, tokens, again, method = _measure(model, data, columns, "naive", on_step)
        forwards += again
    return kl, tokens, forwards, method


def _logits(answers: Answers, batch: Batch) -> Tensor:
    return answers(batch)[0]


def _agreed(reason: str) -> str:
    """Return the first process's reason that has one: all resume or none does."""
    return next((each for each in processes.gather(reason) if each), "")


def _rows(table: Tensor) -> tuple[tuple[float, float], ...]:
    return tuple((float(text), float(vision)) for text, vision in table)
