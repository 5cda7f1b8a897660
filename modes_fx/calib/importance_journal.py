"""Importance in parts that a journal keeps: a run that was cut off repeats one part at most.

What is measured are sums over answer tokens, so the batches can be measured part by part. A part is made of the same share of
every process's batches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import TypedDict

import torch
from torch import nn

from modes_fx.calib import processes
from modes_fx.calib.importance import Importance, OnStep, layer_importance
from modes_fx.calib.journal import Journal, opened
from modes_fx.calib.objective import checked, optimized
from modes_fx.calib.trials import data_hash, what_determines
from modes_fx.data.batch import Batch
from modes_fx.errors import CalibrationError
from modes_fx.files.importance_fields import Method, Mode

_PARTS = 20


class _Part(TypedDict):
    kl: tuple[tuple[float, float], ...]
    answer_tokens: int
    forwards: float
    method: Method


def resumable_importance(
    model: nn.Module,
    batches: Iterable[Batch],
    mode: Mode = "reference",
    method: Method = "resumed",
    *,
    journal: str | os.PathLike[str] | Journal | None = None,
    on_step: OnStep | None = None,
) -> Importance:
    """Measure the importance of every MoE layer like ``layer_importance``, keeping what is done in a journal.

    Args:
        model: See ``layer_importance``.
        batches: See ``layer_importance``.
        mode: See ``layer_importance``.
        method: See ``layer_importance``.
        journal: The file; None measures all at once. Or an open journal, all of whose entries the caller knows to be of this
            model and data.
        on_step: Called with (steps done, steps in all) of this process.

    Raises:
        CalibrationError: As ``layer_importance`` does, or the journal belongs to another run.
    """
    if journal is None:
        return layer_importance(model, batches, mode, method=method, on_step=on_step)
    data = checked(batches)
    counts = processes.gather(len(data))
    if not sum(counts):
        raise CalibrationError("Calibration needs at least one batch.")
    parts = min(_PARTS, max(counts))
    started, sums, tokens, forwards, used = time.monotonic(), torch.zeros((), dtype=torch.float64), 0, 0.0, set()
    with optimized(model):
        records = opened(journal, lambda: {**what_determines(model, data_hash(data)), "split": counts})
        for part in range(parts):
            first, last = part * len(data) // parts, (part + 1) * len(data) // parts
            share = data[first:last]
            key = ("importance", mode, method, part, parts)
            known = records.get(key, _Part)
            if known is None:
                found = layer_importance(model, share, mode, method=method, on_step=_of_part(first, last, len(data), on_step))
                known = {
                    "kl": found.kl,
                    "answer_tokens": found.answer_tokens,
                    "forwards": found.forwards,
                    "method": found.method,
                }
                records.add(key, {**known})
            sums = sums + torch.tensor(known["kl"], dtype=torch.float64) * known["answer_tokens"]
            tokens += known["answer_tokens"]
            forwards += known["forwards"] * len(share) / max(len(data), 1)
            used.add(known["method"])
    whole: Method = "naive" if "naive" in used else method
    return Importance.of(sums / tokens, mode, tokens, whole, forwards, time.monotonic() - started)


def _of_part(first: int, last: int, batches: int, on_step: OnStep | None) -> OnStep | None:
    """Return what tells ``on_step`` of the steps of the batches from ``first`` to ``last`` as steps of all."""
    if on_step is None:
        return None

    def of_all(done: int, total: int) -> None:
        steps = total // (last - first)  # a batch
        on_step(first * steps + done, batches * steps)

    return of_all
