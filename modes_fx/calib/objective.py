"""What a choice of thresholds costs and saves, measured on data through the very regions that will run."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modes_fx.calib import processes
from modes_fx.calib.routing import RoutingRecorder
from modes_fx.calib.shapes import in_few_shapes
from modes_fx.data.batch import IGNORED, Batch, beginning_of_answers
from modes_fx.errors import CalibrationError, NotOptimizedError
from modes_fx.graph.runtime import Runtime
from modes_fx.models.sharding import processes_of
from modes_fx.optimize import optimize, optimized_state, restore
from modes_fx.plan.budget import Budget

logger = logging.getLogger(__name__)


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


class Answers:
    """A model's logits at the answer tokens: prompt and reference answer in one forward (teacher forcing).

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._device = _input_device(model)

    def ready(self, batches: Iterable[Batch]) -> list[Batch]:
        """Return this process's batches as they are best run: in few shapes where Python runs ahead of the device.

        Raises:
            CalibrationError: One is unusable, here or on another process.
        """
        mine = checked(batches)
        return mine if self._device.type == "cpu" else in_few_shapes(mine)

    def __call__(self, batch: Batch, *, grad: bool = False) -> tuple[Tensor, Tensor]:
        """Return logits [answer tokens, V], and bool [B]: whether greedy decoding gives the answer; where the logits are.

        Nothing that the device computes is read here.
        """
        labels = batch["labels"].cpu()
        if self._device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # of all graphs of a forward, not of each
        inputs = {key: value for key, value in _to_device(batch, self._device).items() if key != "labels"}
        first = beginning_of_answers(labels)
        keep = labels.shape[1] - max(first - 1, 0)
        if self._keeps_logits:
            inputs["logits_to_keep"] = keep
        with torch.set_grad_enabled(grad):
            logits = self._model(**inputs, use_cache=False).logits[:, -keep:-1]
            return at_answers(logits, labels[:, -keep:][:, 1:])


def at_answers(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits [n, V] of [B, S, V] at the answer tokens, and bool [B]; ``labels`` [B, S] are on the CPU."""
    at = labels != IGNORED
    samples, tokens = (index.to(logits.device) for index in at.nonzero(as_tuple=True))
    right = (logits.argmax(dim=-1) == labels.to(logits.device)) | ~at.to(logits.device)
    return logits[samples, tokens], right.all(dim=1)


def checked(batches: Iterable[Batch]) -> list[Batch]:
    """Return this process's batches.

    Raises:
        CalibrationError: One is unusable, here or on another process.
    """
    return processes.together(lambda: [_checked(batch, index) for index, batch in enumerate(batches)])


class Objective:
    """f and g on data, for any bounds. The unskipped model's answers are computed once.

    With several processes each has its own batches, possibly none; what is measured is the sum over all of them, and the same
    on each (``processes``). Data stays where it is and visits the model batch by batch. The unskipped model's logits at the
    answer tokens wait on the CPU, as the model gives them: ``reference_bytes`` says how much memory they take, 2 bytes x answer
    tokens x vocabulary for a model in bfloat16.

    Args:
        model: An optimised model.
        batches: Keyword arguments of the model's forward, each with ``labels``: int64 [B, S], the answer's token ids and
            -100 elsewhere (prompt + reference answer in one forward: teacher forcing).
        answers: How the model answers them; None in one forward a batch.

    Attributes:
        layers: Paths of the experts modules of the MoE layers.
        num_layers: How many there are, L.
        answer_tokens: Answer tokens measured on, over all processes.
        accuracy: The unskipped model's; see ``Evaluation``.
        reference_bytes: Memory of this process taken by the unskipped answers.

    Raises:
        CalibrationError: No batch, or one without ``labels`` or without answer tokens, on all processes; or the model is
            sharded over processes.
        NotOptimizedError: The model is not optimised.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Batch], answers: Answers | None = None) -> None:
        check_whole(model)
        self._model = model
        self._runtime = optimized_state(model).runtime
        self._answers = answers or Answers(model)
        self.layers = tuple(layer.name for layer in self._runtime.layers)
        self.num_layers = len(self.layers)
        self._batches = self._answers.ready(batches)
        self._reference: list[Tensor] = []  # logits [answer tokens, V] of each batch, on the CPU
        samples, right = 0, 0
        logger.info("the unskipped model answers %d batches", len(self._batches))
        with bounds_in_force(self._runtime, None):
            for batch in self._batches:
                logits, correct = self._answers(batch)
                self._reference.append(logits.cpu())
                samples, right = samples + len(correct), right + int(correct.sum())
        self.reference_bytes = sum(logits.nbytes for logits in self._reference)
        logger.debug("the unskipped answers take %.1f MB on the CPU", self.reference_bytes / 1e6)
        sums = torch.tensor([sum(len(logits) for logits in self._reference), samples, right])
        self.answer_tokens, self._samples, right = (int(value) for value in processes.total(sums))
        if not self._samples:
            raise CalibrationError("Calibration needs at least one batch.")
        self.accuracy = right / self._samples

    def evaluate(self, bounds: Tensor | Budget) -> Evaluation:
        """Run all batches under bounds on the dispatched weights; every process calls this with the same ones.

        Args:
            bounds: float32 [L, 2], (text, vision); see ``SkipPlan.bounds``. Or what sets them as it goes.
        """
        stats = self._runtime.stats
        routed, kept = stats.pairs_routed, stats.pairs_kept
        kl: list[Tensor] = []
        right: list[Tensor] = []
        with bounds_in_force(self._runtime, bounds), stats.counting():
            for batch, reference in zip(self._batches, self._reference, strict=True):
                logits, correct = self._answers(batch)
                kl.append(divergence_of_rows(reference.to(logits.device), logits).sum(dtype=torch.float64))
                right.append(correct.sum())
        # One sum over processes: counts below 2**53 are exact in float64.
        counted = torch.stack([stats.pairs_routed - routed, stats.pairs_kept - kept]).sum(dim=(1, 3))
        found = sum(map(float, kl)), sum(map(int, right)), *counted.flatten().tolist()  # read when all is on its way
        sums = processes.total(torch.tensor(found, dtype=torch.float64)).tolist()
        (loss, correct_answers), routed_m, kept_m = sums[:2], sums[2:4], sums[4:]
        return Evaluation(
            kl=max(loss, 0.0) / self.answer_tokens,
            skip_ratio=_skipped(sum(routed_m), sum(kept_m)),
            skip_ratio_text=_skipped(routed_m[0], kept_m[0]),
            skip_ratio_vision=_skipped(routed_m[1], kept_m[1]),
            accuracy=correct_answers / self._samples,
        )

    def routing_weights(self) -> RoutingRecorder:
        """Run the unskipped model once more, uncompiled, and return the weights that it dispatched."""
        logger.info("routing weights of %d batches, uncompiled", len(self._batches))
        with bounds_in_force(self._runtime, None), RoutingRecorder(self._model) as recorder:
            for batch in self._batches:
                self._answers(batch)
        return recorder


def check_whole(model: nn.Module) -> None:
    """Refuse a model that lies in several processes: each measures batches of its own, and so many forwards as they need.

    Raises:
        CalibrationError: The model is sharded.
    """
    if (number := processes_of(model)) > 1:
        raise CalibrationError(
            f"{type(model).__name__} is sharded over {number} processes, and calibration gives each of them its own batches. "
            'Load the model whole, with device_map="auto" over several GPUs, and use the plan for the sharded one.'
        )


def divergence_of_rows(reference: Tensor, logits: Tensor) -> Tensor:
    """Return KL(softmax(reference) || softmax(logits)) in nats of each row, float64 [n]; both [n, V], on one device."""
    log_p, log_q = (torch.log_softmax(values.float(), dim=-1) for values in (reference, logits))
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1, dtype=torch.float64)


@contextlib.contextmanager
def optimized(model: nn.Module) -> Iterator[nn.Module]:
    """Optimise a model for the length of a block, if it is not; bounds in force before come back after it.

    Raises:
        CalibrationError: The model is optimised with another rule than thresholds, which mean nothing to it; or sharded.
    """
    check_whole(model)
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
        with bounds_in_force(state.runtime, None):
            yield model


@contextlib.contextmanager
def bounds_in_force(runtime: Runtime, bounds: Tensor | Budget | None) -> Iterator[None]:
    """Put bounds in force for the length of a block; those from before come back."""
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


def _input_device(model: nn.Module) -> torch.device:
    """Return where the model wants its inputs; the hooks of an offloaded model move them from the CPU themselves."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def _skipped(routed: float, kept: float) -> float:
    return 1 - kept / routed if routed else float("nan")
