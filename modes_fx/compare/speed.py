"""How fast a model runs under a plan against the same weights in stock transformers, measured in turn."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modes_fx.calib.objective import IGNORED, Batch
from modes_fx.optimize import stats

NEW_TOKENS = 16
ROUNDS = 5  # stock and skipping in each, after one to warm up


class Stopwatch:
    """Times prefill and decoding of one batch of prompts.

    Args:
        model: The model before it is optimised; a stock twin that shares its weights is kept.
        batch: One batch of test data; its answers are cut off.
    """

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self._stock = copy.deepcopy(model, shared)
        self._prompts = prompts_of(batch, next(model.parameters()).device)

    def __call__(self, model: nn.Module) -> tuple[dict[str, float], dict[str, float]]:
        """Return how many times as fast as stock ``prefill`` and ``decode`` are, and the skip ratios of both phases."""
        times: dict[str, list[tuple[float, float]]] = {"stock": [], "ours": []}
        for round_ in range(ROUNDS + 1):
            for name, timed in (("stock", self._stock), ("ours", model)):
                first = self._seconds(timed, 1)
                more = self._seconds(timed, 1 + NEW_TOKENS)
                if round_:
                    times[name].append((first, max(more - first, 1e-9)))
        counted = stats(model)
        with counted.reset().counting():
            self._seconds(model, 1 + NEW_TOKENS)
        stock, ours = ([statistics.median(column) for column in zip(*times[name], strict=True)] for name in ("stock", "ours"))
        ratios = {phase: counted.skip_ratio(phase=phase) for phase in ("prefill", "decode")}
        return {"prefill": stock[0] / ours[0], "decode": stock[1] / ours[1]}, ratios

    def _seconds(self, model: Any, new_tokens: int) -> float:
        if self._device_is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        model.generate(**self._prompts, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False)
        if self._device_is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    @property
    def _device_is_cuda(self) -> bool:
        return self._prompts["input_ids"].is_cuda


def prompts_of(batch: Batch, device: torch.device) -> Mapping[str, Tensor]:
    """Return a batch without labels, cut where the first answer begins."""
    first = int((batch["labels"] != IGNORED).any(dim=0).nonzero()[0])
    whole = batch["labels"].shape
    return {
        key: (value[:, :first] if value.shape[:2] == whole else value).to(device)
        for key, value in batch.items()
        if key != "labels" and isinstance(value, Tensor)
    }
