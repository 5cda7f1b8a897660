"""Choices of thresholds that were measured: each once, on all processes alike, and on record in a journal."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

import torch
import transformers
from torch import Tensor, nn

from modes_fx.calib import processes
from modes_fx.calib.journal import Journal
from modes_fx.calib.objective import Evaluation, Objective
from modes_fx.data.batch import Batch
from modes_fx.files import strict_json
from modes_fx.files.strict_json import Number
from modes_fx.modality import MODALITIES
from modes_fx.plan import PlanPoint, SkipPlan, config_hash
from modes_fx.quantise.memory import plain_parts

Alpha = tuple[tuple[float, float], ...]


class Entry(TypedDict):
    """An ``Evaluation`` as a journal keeps it: null for NaN."""

    kl: Number | None
    skip_ratio: Number | None
    skip_ratio_text: Number | None
    skip_ratio_vision: Number | None
    accuracy: Number | None


class _Grids(TypedDict):
    text: list[float]
    vision: list[float]


@dataclass(frozen=True)
class Trial:
    """One evaluated choice of thresholds."""

    gamma: float
    tau_text: float
    tau_vision: float
    evaluation: Evaluation

    def flat(self) -> dict[str, float]:
        """Return the choice, its loss ``kl`` and its skip ratio ``ratio``, as reports hold it."""
        found = self.evaluation
        choice = {"gamma": self.gamma, "tau_text": self.tau_text, "tau_vision": self.tau_vision}
        return {**choice, "kl": found.kl, "ratio": found.skip_ratio}


class Trials:
    """Evaluates choices of thresholds, unless the journal knows them.

    Args:
        objective: What to evaluate them on.
        alpha: Importance of each layer.
        journal: Where each evaluation is kept.
        deadline: On the main process's ``time.monotonic()``; infinite without a time budget.
        on_trial: Called with each new trial, known or not.

    Attributes:
        made: Trials asked for so far, by (gamma, tau_text, tau_vision).
        measured: How many of them were evaluated here; the journal knew the others.
    """

    def __init__(
        self, objective: Objective, alpha: Alpha, journal: Journal, deadline: float, on_trial: Callable[[Trial], None] | None
    ) -> None:
        self._objective, self._alpha, self._journal = objective, alpha, journal
        self._deadline, self._on_trial = deadline, on_trial
        self.made: dict[tuple[float, float, float], Trial] = {}
        self.measured = 0
        self._seconds = 0.0  # of all measured

    def __call__(self, gamma: float, tau_text: float, tau_vision: float) -> Trial:
        """Return the trial of a choice."""
        choice = (gamma, tau_text, tau_vision)
        if choice not in self.made:
            key = ("trial", *choice)
            known = self._journal.get(key, Entry)
            if known is None:
                started = time.monotonic()
                evaluation = self._objective.evaluate(thresholds(self._alpha, *choice).bounds(self._objective.num_layers))
                self._journal.add(key, as_entry(evaluation))
                self.measured += 1
                self._seconds += time.monotonic() - started
            else:
                evaluation = from_entry(known)
            self.made[choice] = Trial(*choice, evaluation)
            if self._on_trial is not None:
                self._on_trial(self.made[choice])
        return self.made[choice]

    def grids(self, gamma: float, size: int, make: Callable[[], list[list[float]]]) -> list[list[float]]:
        """Return the thresholds to try, (text, vision); the journal's, for another machine's rounding might move a quantile."""
        key = ("grid", gamma, size)
        known = self._journal.get(key, _Grids)
        if known is not None:
            return [known["text"], known["vision"]]
        made = make()
        self._journal.add(key, dict(zip(MODALITIES, made, strict=True)))
        return made

    def out_of_time(self, reserve: int = 0) -> bool:
        """Say, the same on all processes, whether the time left is shorter than ``reserve`` more evaluations take."""
        if self._deadline == math.inf:
            return False
        needed = self._seconds / max(self.measured, 1) * reserve
        return processes.from_main(lambda: time.monotonic() + needed >= self._deadline)


def as_entry(evaluation: Evaluation) -> dict[str, float | None]:
    """Return an evaluation as an ``Entry``."""
    return {name: None if math.isnan(value) else value for name, value in asdict(evaluation).items()}


def from_entry(entry: Entry) -> Evaluation:
    """Return the evaluation that a journal kept."""
    values: Mapping[str, float | None] = strict_json.numbers(entry)
    return Evaluation(**{name: math.nan if value is None else value for name, value in values.items()})


def pareto(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    """Return the trials that no other beats in both skip ratio and loss, by ascending ratio; of equals the first."""
    best: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (-trial.evaluation.skip_ratio, trial.evaluation.kl)):
        if not best or trial.evaluation.kl < best[-1].evaluation.kl:
            best.append(trial)
    return tuple(reversed(best))


def thresholds(alpha: Alpha | None, gamma: float, tau_text: float, tau_vision: float) -> SkipPlan:
    """Return the plan with one choice of thresholds."""
    return SkipPlan((PlanPoint(None, tau_text, tau_vision, gamma),), alpha)


def what_determines(model: nn.Module, data: str, alpha: Alpha | None = None) -> dict[str, Any]:
    """Return what every entry of a journal depends on.

    Args:
        model: The model.
        data: Hash of the data, such as ``data_hash``.
        alpha: The importance, where entries depend on it.
    """
    device = next(model.parameters()).device.type
    return {
        "model": config_hash(getattr(model, "config", None)),
        "weights": weights_hash(model),
        "data": data,
        **({} if alpha is None else {"alpha": short_hash(json.dumps(alpha).encode())}),
        "versions": versions(),
        **({} if device == "cpu" else {"device": device}),  # not "cpu": the journals of older releases go on
    }


def versions() -> dict[str, str]:
    """Return the versions that what is measured depends on."""
    from modes_fx import __version__

    return {"modes_fx": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def data_hash(batches: Iterable[Batch]) -> str:
    """Return a short hash of all tensors of all processes' batches; the order of the batches does not matter."""
    digests = []
    for batch in batches:
        tensors = ((key, batch[key]) for key in sorted(batch) if isinstance(batch[key], Tensor))
        digests.append(short_hash(*(part for key, tensor in tensors for part in (key.encode(), _bytes(tensor)))))
    return short_hash("".join(sorted(digest for share in processes.gather(digests) for digest in share)).encode())


def weights_hash(model: nn.Module) -> str:
    """Return a short hash of the first elements of every parameter, by which checkpoints of one architecture differ."""
    parameters = sorted(model.named_parameters(), key=lambda item: item[0])
    heads = (
        (
            f"{name} {list(weight.shape)} {weight.dtype}".encode(),
            b"" if weight.is_meta else b"".join(_bytes(part.detach().flatten()[:64]) for part in plain_parts(weight)),
        )
        for name, weight in parameters
    )
    return short_hash(*(part for head in heads for part in head))


def short_hash(*parts: bytes) -> str:
    """Return 16 hexadecimal digits of the parts' hash."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes()


def as_point(trial: Trial, target: float | None = None) -> PlanPoint:
    """Return a trial as a point of a plan, of the target it was chosen for if any."""
    found = trial.evaluation
    ratios = {"calibration": found.skip_ratio, "text": found.skip_ratio_text, "vision": found.skip_ratio_vision}
    present = {name: ratio for name, ratio in ratios.items() if not math.isnan(ratio)}  # no NaN of an absent modality
    return PlanPoint(target, trial.tau_text, trial.tau_vision, trial.gamma, present, {"calibration": found.kl})
