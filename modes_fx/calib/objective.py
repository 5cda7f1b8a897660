"""What a choice of thresholds costs and saves, measured on data through the very regions that will run."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modes_fx.calib.routing import RoutingRecorder
from modes_fx.errors import CalibrationError, NotOptimizedError
from modes_fx.optimize import optimize, optimized_state, restore
from modes_fx.runtime import ModelRuntime

IGNORED = -100
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """Measured on all batches of an ``Objective``.

    Attributes:
        kl: f, mean over answer tokens of KL(unskipped || skipped), in nats.
        skip_ratio: g, dropped / routed pairs over all MoE layers, in [0, 1]; padding left out.
        skip_ratio_text: The same over text tokens; NaN without any.
        skip_ratio_vision: The same over visual tokens; NaN without any.
        accuracy: Share of samples all of whose answer tokens are the most likely ones (greedy decoding gives the answer).
    """

    kl: float
    skip_ratio: float
    skip_ratio_text: float
    skip_ratio_vision: float
    accuracy: float


class Objective:
    """f and g on data, for any bounds. The unskipped model's answers are computed once.

    Args:
        model: An optimised model.
        batches: Keyword arguments of the model's forward, each with ``labels``: int64 [B, S], the answer's token ids and
            -100 elsewhere (prompt + reference answer in one forward: teacher forcing).

    Raises:
        CalibrationError: No batch, or one without ``labels`` or without answer tokens.
        NotOptimizedError: The model is not optimised.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        self._model = model
        self._runtime = optimized_state(model).runtime
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        device = next(model.parameters()).device
        self._batches = [_to_device(_checked(batch, index), device) for index, batch in enumerate(batches)]
        if not self._batches:
            raise CalibrationError("Calibration needs at least one batch.")
        with _bounds_in_force(self._runtime, None):
            answers = [self._answers(batch) for batch in self._batches]
        self._reference = [log_probs for log_probs, _ in answers]
        self.layers = tuple(layer.name for layer in self._runtime.layers)
        self.num_layers = len(self.layers)
        self.accuracy = self._accuracy(correct for _, correct in answers)
        self.answer_tokens = sum(len(log_probs) for log_probs in self._reference)

    def evaluate(self, bounds: Tensor) -> Evaluation:
        """Run all batches under bounds on the dispatched weights.

        Args:
            bounds: float32 [L, 2], (text, vision); see ``SkipPlan.bounds``.
        """
        stats = self._runtime.stats
        routed, kept = stats.pairs_routed, stats.pairs_kept
        total, correct = 0.0, []
        with _bounds_in_force(self._runtime, bounds), stats.counting():
            for batch, reference in zip(self._batches, self._reference, strict=True):
                log_probs, right = self._answers(batch)
                total += float((reference.exp() * (reference - log_probs)).sum(dtype=torch.float64))
                correct.append(right)
        routed_m = (stats.pairs_routed - routed).sum(dim=(0, 2)).tolist()
        kept_m = (stats.pairs_kept - kept).sum(dim=(0, 2)).tolist()
        return Evaluation(
            kl=max(total, 0.0) / self.answer_tokens,
            skip_ratio=_skipped(sum(routed_m), sum(kept_m)),
            skip_ratio_text=_skipped(routed_m[0], kept_m[0]),
            skip_ratio_vision=_skipped(routed_m[1], kept_m[1]),
            accuracy=self._accuracy(correct),
        )

    def routing_weights(self) -> RoutingRecorder:
        """Run the unskipped model once more, uncompiled, and return the weights that it dispatched."""
        with _bounds_in_force(self._runtime, None), RoutingRecorder(self._model) as recorder:
            for batch in self._batches:
                self._forward(batch)
        return recorder

    @staticmethod
    def _accuracy(correct: Iterable[Tensor]) -> float:
        return float(torch.cat(list(correct)).float().mean())

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits [B, S', V] and labels [B, S'] of the positions from the first answer on."""
        labels = batch["labels"]
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        first = int((labels != IGNORED).any(dim=0).nonzero()[0])
        keep = labels.shape[1] - max(first - 1, 0)
        if self._keeps_logits:
            inputs["logits_to_keep"] = keep
        with torch.no_grad():
            logits = self._model(**inputs, use_cache=False).logits
        return logits[:, -keep:], labels[:, -keep:]

    def _answers(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return float32 log-probabilities [answer tokens, V], and bool [B]: whether greedy decoding gives the answer."""
        logits, labels = self._forward(batch)
        logits, labels = logits[:, :-1], labels[:, 1:]
        at = labels != IGNORED
        correct = ((logits.argmax(dim=-1) == labels) | ~at).all(dim=1)
        return torch.log_softmax(logits[at].float(), dim=-1), correct.cpu()


@contextlib.contextmanager
def optimized(model: nn.Module) -> Iterator[nn.Module]:
    """Optimise a model for the length of a block, if it is not; bounds in force before come back after it.

    Raises:
        CalibrationError: The model is optimised with another rule than thresholds, which mean nothing to it.
    """
    try:
        state = optimized_state(model)
    except NotOptimizedError:
        optimize(model)
        try:
            yield model
        finally:
            restore(model)
    else:
        if state.rule != "threshold":
            raise CalibrationError(
                f"Calibration sets thresholds, but the model is optimised with the keep-rule {state.rule!r}. "
                "Call modes_fx.restore(model) first."
            )
        with _bounds_in_force(state.runtime, None):
            yield model


@contextlib.contextmanager
def _bounds_in_force(runtime: ModelRuntime, bounds: Tensor | None) -> Iterator[None]:
    before = runtime.bounds_in_force
    runtime.set_bounds(bounds)
    try:
        yield
    finally:
        runtime.set_bounds(before)


def _checked(batch: Batch, index: int) -> Batch:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        raise CalibrationError(
            f"Batch {index} needs `labels`, int64 [batch, sequence] with the answer's token ids and {IGNORED} elsewhere."
        )
    input_ids = batch.get("input_ids")
    if isinstance(input_ids, Tensor) and input_ids.shape != labels.shape:
        raise CalibrationError(
            f"Batch {index} has labels of shape {list(labels.shape)} for input_ids of shape {list(input_ids.shape)}: "
            "expected one label a token."
        )
    if not bool((labels[:, 1:] != IGNORED).any()):
        raise CalibrationError(f"Batch {index} has no answer token in its labels: all are {IGNORED}.")
    return batch


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _skipped(routed: int, kept: int) -> float:
    return 1 - kept / routed if routed else float("nan")
