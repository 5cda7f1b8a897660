"""The skip plan: layer importance, thresholds for each skip ratio, and where they came from; a JSON file."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import torch
from torch import Tensor

from modes_fx.errors import PlanError
from modes_fx.files import plan_fields, strict_json
from modes_fx.modality import vision_token_ids
from modes_fx.policies import RULES

Mode = Literal["fixed", "budget"]

# What a config says of a run or a file rather than of the architecture: two dtypes of one model share their plans.
_VOLATILE_KEYS = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "output_attentions",
    "output_hidden_states", "return_dict", "problem_type", "id2label", "label2id", "chunk_size_feed_forward",
}  # fmt: skip


@dataclass(frozen=True)
class PlanPoint:
    """Thresholds for one target, and what they did to the data they were chosen on.

    Attributes:
        target: Skip ratio searched for, in [0, 1]; None for thresholds given by hand, and on the frontier.
        tau_text: Threshold of text tokens on ``alpha**gamma * weight``, >= 0.
        tau_vision: The same for visual tokens.
        gamma: Exponent of the layer importance; 1 is MoDES as published, 0 leaves it out.
        realised: Measured skip ratios by name, such as ``calibration`` or ``text``.
        kl: Measured mean KL divergence from the unskipped model on answer tokens, in nats, by data set.
    """

    target: float | None
    tau_text: float
    tau_vision: float
    gamma: float = 1.0
    realised: Mapping[str, float] = field(default_factory=dict)
    kl: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tau_text", "tau_vision", "gamma"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or math.isnan(value) or value < 0:
                raise PlanError(f"{name} must be a number >= 0, got {value!r}.")
        if self.target is not None and not 0 <= self.target <= 1:
            raise PlanError(f"A target is a skip ratio in [0, 1], got {self.target!r}.")


@dataclass(frozen=True)
class SkipPlan:
    """Which experts a model may leave out, for one or more target skip ratios.

    A pair of token and expert is kept if ``alpha[l, m]**gamma * weight >= tau[m]``, for layer l, the token's modality m and
    the weight as the model dispatches it (MoDES, arXiv 2511.15690; gamma tempers its layer importance).

    Attributes:
        points: One for each target that was searched for and met, ascending.
        alpha: Importance of each MoE layer for (text, vision) tokens, each column summing to 1; None leaves it out.
        layers: Paths of the experts modules that the rows of ``alpha`` belong to.
        model: What ``describe_model`` says of the model it was made for; empty fits any.
        provenance: How it was made, such as ``data_hash``, ``versions``, ``search`` and, where known, ``seed`` and ``command``.
        rule: Name of the keep-rule in ``modes_fx.policies.RULES``; for any rule the bound of a layer is ``tau / alpha**gamma``.
        frontier: All points measured on the calibration data that no other beats in both skip ratio and loss, ascending in
            both: the target of each is its ``realised["calibration"]``, its loss ``kl["calibration"]``.
        mode: ``"fixed"``: the thresholds as they are, whatever an input's own skip ratio. ``"budget"``: thresholds move so that
            each prefill keeps to the target; see ``modes_fx.plan.budget``.
        weights: For each MoE layer (text, vision), quantiles of the routing weights of the unskipped model on the calibration
            data, at equal steps from the smallest to the largest; needed for budgets.
        tables: For a rule that asks for a table, one for each MoE layer: numbers in nested sequences; else None.
    """

    points: tuple[PlanPoint, ...]
    alpha: tuple[tuple[float, float], ...] | None = None
    layers: tuple[str, ...] = ()
    model: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    rule: str = "threshold"
    frontier: tuple[PlanPoint, ...] = ()
    mode: Mode = "fixed"
    weights: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = ()
    tables: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        if not self.points:
            raise PlanError("A skip plan needs at least one point.")
        if self.rule not in RULES:
            raise PlanError(f"Unknown keep-rule {self.rule!r}; known: {', '.join(RULES)}. Yours: modes_fx.policies.register().")
        if RULES[self.rule].has_table != (self.tables is not None):
            taken = "a table" if self.tables is None else "no table"
            raise PlanError(f"The keep-rule {self.rule!r} takes {taken} for each layer.")
        if not isinstance(self.model, Mapping) or not isinstance(self.provenance, Mapping):
            raise PlanError("A plan's model and provenance are mappings.")
        for row in self.alpha or ():
            if len(row) != 2 or any(not math.isfinite(value) or value < 0 for value in row):
                raise PlanError(f"alpha holds a (text, vision) pair of finite numbers >= 0 for each layer, got {row!r}.")
        for columns in self.weights:
            if len(columns) != 2 or not all(len(each) > 1 and all(a <= b for a, b in pairwise(each)) for each in columns):
                raise PlanError("weights holds, for each layer, ascending quantiles for (text, vision), at least 2 of each.")
        if self.mode not in get_args(Mode):
            raise PlanError(f"Unknown mode {self.mode!r} of a plan; known: {', '.join(get_args(Mode))}.")
        if self.mode == "budget" and (not self.weights or self.rule != "threshold"):
            raise PlanError(
                "A budget needs thresholds, and quantiles of the routing weights that they are set on: use a plan that "
                "modes_fx.calib.search() made."
            )
        missing = math.nan
        measured = [(p.realised.get("calibration", missing), p.kl.get("calibration", missing)) for p in self.frontier]
        if any(math.isnan(value) for pair in measured for value in pair):
            raise PlanError("Each point of a frontier needs its skip ratio and its KL divergence on the calibration data.")
        if any(not low < high for pair in pairwise(measured) for low, high in zip(*pair, strict=True)):
            raise PlanError("A frontier ascends strictly in skip ratio and in KL divergence: else a point of it is beaten.")

    @classmethod
    def uniform(cls, *, text: float, vision: float) -> SkipPlan:
        """Return a plan with one threshold for text and one for vision, directly on the dispatched weights (alpha = 1)."""
        return cls(points=(PlanPoint(None, float(text), float(vision)),))

    @classmethod
    def reduce_k(cls, k: int) -> SkipPlan:
        """Return the plan that keeps each token's ``k`` largest weights, without renormalising them."""
        if k < 0:
            raise PlanError(f"Reduce-k keeps k >= 0 experts, got {k}.")
        return cls(points=(PlanPoint(None, float(k), float(k)),), rule="reduce_k")

    @property
    def targets(self) -> tuple[float, ...]:
        """The target skip ratios that were searched for and met, ascending."""
        return tuple(sorted(point.target for point in self.points if point.target is not None))

    @property
    def target_range(self) -> tuple[float, float] | None:
        """The smallest and the largest skip ratio of the frontier; None without one."""
        return (_ratio(self.frontier[0]), _ratio(self.frontier[-1])) if self.frontier else None

    def point(self, target: float | None = None) -> PlanPoint:
        """Return the thresholds to use for a target.

        A target that was searched for is that very point. Any other skip ratio in ``target_range`` is the point of least loss
        on the frontier that realised at least as much on the calibration data, which may be more by the step to the next point
        measured. Thresholds in between are not made up: nobody measured what they skip.

        Args:
            target: Skip ratio in [0, 1]; None is the largest of ``targets``.

        Raises:
            PlanError: The plan has no such target, or it is no number.
        """
        if target is not None and not isinstance(target, Real):
            raise PlanError(f"A target is a skip ratio in [0, 1], got {target!r}.")
        if target is None:
            return max(self.points, key=lambda point: -1.0 if point.target is None else point.target)
        for point in self.points:
            if point.target is not None and math.isclose(point.target, target, abs_tol=1e-9):
                return point
        if self.frontier and _ratio(self.frontier[0]) <= target <= _ratio(self.frontier[-1]):
            return next(point for point in self.frontier if _ratio(point) >= target)
        known = ", ".join(f"{value:g}" for value in self.targets) or "none (its thresholds were given by hand)"
        between = " and any from {:.4g} to {:.4g}".format(*self.target_range) if self.target_range else ""
        raise PlanError(f"The plan has no target {target!r}; its targets: {known}{between}.")

    def bounds(self, num_layers: int, target: float | None = None) -> Tensor:
        """Return the bounds on the dispatched weights.

        Args:
            num_layers: MoE layers of the model, L.
            target: See ``point``.

        Returns:
            float32 [L, 2], (text, vision): ``tau / alpha**gamma``. 0 keeps all, whatever alpha; alpha = 0 skips all.

        Raises:
            PlanError: Unknown target, or ``alpha`` is for another number of layers.
        """
        point = self.point(target)
        if self.alpha is not None and len(self.alpha) != num_layers:
            raise PlanError(f"The plan is for {len(self.alpha)} MoE layers, the model has {num_layers}.")
        taus = (point.tau_text, point.tau_vision)
        rows = self.alpha or ((1.0, 1.0),) * num_layers
        return torch.tensor(
            [[_bound(tau, alpha, point.gamma) for tau, alpha in zip(taus, row, strict=True)] for row in rows],
            dtype=torch.float32,
            device="cpu",
        )

    def table_tensors(self, num_layers: int) -> tuple[Tensor, ...]:
        """Return the rule's tables, float32, one a layer.

        Raises:
            PlanError: There are none, too many or too few, or they are no numbers.
        """
        if self.tables is None or len(self.tables) != num_layers:
            raise PlanError(f"The plan has tables for {len(self.tables or ())} MoE layers, the model has {num_layers}.")
        try:
            return tuple(torch.tensor(table, dtype=torch.float32, device="cpu") for table in self.tables)
        except (TypeError, ValueError, RuntimeError) as error:
            raise PlanError(f"A plan's table holds rows of numbers, all as long: {error}.") from error

    def with_provenance(self, **said: Any) -> SkipPlan:
        """Return the plan with more said of how it was made.

        Args:
            said: JSON values, such as ``seed=0`` and ``command=sys.argv``.
        """
        return replace(self, provenance={**self.provenance, **said})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as JSON, with a digest of its content; an interrupted write leaves an older file as it was.

        Raises:
            ModesFxError: The file cannot be written, or the plan holds what JSON does not have.
        """
        return plan_fields.write(path, asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, check_digest: bool = True) -> SkipPlan:
        """Read a plan file; warn of one that was written before plans had a digest.

        Args:
            path: The file.
            check_digest: Whether a file that was damaged or changed by hand is refused; ``modes-fx plan sign`` signs a change.

        Raises:
            PlanError: The file is missing, truncated, damaged, changed, not a plan, or of a newer schema.
        """
        read = plan_fields.read(path, check_digest=check_digest)
        try:
            return cls(
                points=_points(read.points),
                alpha=read.alpha or None,
                layers=read.layers,
                model=read.model,
                provenance=read.provenance,
                rule=read.rule,
                frontier=_points(read.frontier),
                mode=read.mode,
                weights=read.weights,
                tables=strict_json.tuples(read.tables),
            )
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error

    def check_model(self, config: Any) -> None:
        """Refuse a model that the plan was not made for.

        Raises:
            PlanError: The configs differ.
        """
        if self.model and self.model.get("config_hash") != config_hash(config):
            raise PlanError(
                f"The plan was made for another model: {self.model.get('model_type')} with config "
                f"{self.model.get('config_hash')}, not {getattr(config, 'model_type', '?')} with {config_hash(config)}. "
                "Calibrate this model, or load the one that the plan belongs to."
            )


def describe_model(config: Any) -> dict[str, Any]:
    """Return what a plan keeps of the model it is for: its type, the hash of its config, its visual placeholder ids."""
    return {
        "model_type": str(getattr(config, "model_type", "")),
        "config_hash": config_hash(config),
        "vision_token_ids": list(vision_token_ids(config)),
    }


def config_hash(config: Any) -> str:
    """Return a short hash of a model's architecture: its config without dtype, paths and versions."""
    content = config.to_dict() if hasattr(config, "to_dict") else {}
    canonical = json.dumps(_architecture(content), sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _architecture(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            str(key): _architecture(item)
            for key, item in value.items()
            if key not in _VOLATILE_KEYS and not str(key).startswith("_")
        }
    return [_architecture(item) for item in value] if isinstance(value, (list, tuple)) else value


def _bound(tau: float, alpha: float, gamma: float) -> float:
    if tau == 0:
        return 0.0
    scale = alpha**gamma  # 0.0 ** 0.0 is 1: without importance, alpha = 0 counts like any other
    return tau / scale if scale > 0 else math.inf


def _points(fields: Sequence[plan_fields.PointFields]) -> tuple[PlanPoint, ...]:
    return tuple(PlanPoint(**msgspec.structs.asdict(point)) for point in fields)


def _ratio(point: PlanPoint) -> float:
    return point.realised["calibration"]
