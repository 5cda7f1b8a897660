"""Plans from the files of MoDES's reference implementation (github ModelTC/MoDES, arXiv 2511.15690).

Accepted as importance, one number for each MoE layer and, mostly, modality:

    {layer: number}                    one for both modalities
    {layer: {modality: number}}
    {modality: numbers} or {modality: {layer: number}}
    numbers                            a list, tensor or array [L], for both modalities
    rows                               a list, tensor or array [L, 2] of (text, vision), or a list of {modality: number}

A layer is an integer, or text with one integer in it (``"layers.3.mlp"``); they count in that order. A modality is ``text`` or
``language``, or ``vision``, ``visual`` or ``image``. A number may be a tensor of one element. A dict may hold all this under
``importance`` or ``alpha``.

Accepted as thresholds: ``{"tau_text": number, "tau_vision": number}`` (``_t``; ``_v``, ``_visual``, ``_image``), perhaps with
its ``target`` (``target_ratio``, ``skip_ratio``, ``ratio``, ``rho``); a list of such; or ``{target: such}``.

Everything else is refused by name. Nothing in the files is run: see ``safe_pickle``.

NOTE [what changes on the way] The decision is ``alpha[l, m] * pi < tau[m]``. It stays the same if alpha and tau are divided by
one number, as they are where a modality's importance does not sum to 1; and if pi and tau are multiplied by one, as they are
where the model scales its routing weights by a constant: the reference scores them before that, modes-fx what is dispatched.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from modes_fx.calib.safe_pickle import load_numbers
from modes_fx.calib.trials import short_hash, versions
from modes_fx.errors import PlanError
from modes_fx.modality import MODALITIES
from modes_fx.plan import PlanPoint, SkipPlan, describe_model

_NAMES = {"text": 0, "language": 0, "t": 0, "vision": 1, "visual": 1, "image": 1, "v": 1}
_TARGETS = ("target", "target_ratio", "skip_ratio", "ratio", "rho")
_SCALES_ITS_OUTPUT = ("beam", "minimax_m3_vl")  # not the weights of single experts

Row = tuple[float, float]


def import_reference(
    importance_path: str | os.PathLike[str],
    tau_path: str | os.PathLike[str],
    config: Any,
    *,
    normalized_on_load: bool = False,
) -> SkipPlan:
    """Make a plan of the reference implementation's importance and thresholds.

    Args:
        importance_path: ``torch.save`` or pickle file; the module's docstring says what it may hold.
        tau_path: The same, for thresholds.
        config: Of the model they were made for.
        normalized_on_load: Whether thresholds are meant for the importance after each modality is made to sum to 1, rather than
            as it stands in its file. It makes a difference only where it does not.

    Returns:
        A plan with a point for each pair of thresholds. What they skip was not measured: ``realised`` and ``kl`` are empty.

    Raises:
        PlanError: A file is unreadable, holds more than numbers, has another form, or more layers than the model.
    """
    alpha = _read(importance_path, "importance", _importance)
    points = _read(tau_path, "thresholds", _thresholds)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = getattr(text, "num_hidden_layers", None)
    if isinstance(layers, int) and len(alpha) > layers:
        raise PlanError(f"{importance_path} has importance for {len(alpha)} layers, the model has {layers}.")
    sums = [sum(column) for column in zip(*alpha, strict=True)]
    for modality, total in zip(MODALITIES, sums, strict=True):
        if not (math.isfinite(total) and total > 0):
            raise PlanError(f"{importance_path}: the importance for {modality} sums to {total!r}, expected a number above 0.")
    divisors = [1.0 if math.isclose(total, 1, rel_tol=1e-5) else total for total in sums]
    factor = _scaling_factor(text)
    by = [factor / (1.0 if normalized_on_load else divisor) for divisor in divisors]
    scaled = (replace(point, tau_text=point.tau_text * by[0], tau_vision=point.tau_vision * by[1]) for point in points)
    try:
        return SkipPlan(
            points=tuple(sorted(scaled, key=lambda point: point.target or 0.0)),
            alpha=tuple((row[0] / divisors[0], row[1] / divisors[1]) for row in alpha),
            model=describe_model(config),
            provenance={
                "imported": {
                    name: {"file": Path(path).name, "hash": short_hash(Path(path).read_bytes())}
                    for name, path in (("importance", importance_path), ("thresholds", tau_path))
                },
                "importance_sums": dict(zip(MODALITIES, sums, strict=True)),
                "normalized_on_load": normalized_on_load,
                "routed_scaling_factor": factor,
                "versions": versions(),
            },
        )
    except PlanError as error:
        raise PlanError(f"{importance_path} and {tau_path} make no plan: {error}") from error


def _read(path: str | os.PathLike[str], what: str, parse: Callable[[Any], Any]) -> Any:
    content = load_numbers(path)
    try:
        return parse(content)
    except PlanError as error:
        raise PlanError(f"{path} holds no {what} of a known form: {error} modes_fx.calib.reference lists the forms.") from error
    except (OverflowError, RecursionError, ValueError) as error:  # integers beyond all floats or texts, or a deep file
        raise PlanError(f"{path} holds no {what} of a known form: {error}.") from error


def _scaling_factor(config: Any) -> float:
    """Return the constant by which a model multiplies its routing weights before dispatch."""
    if str(getattr(config, "model_type", "")).startswith(_SCALES_ITS_OUTPUT):
        return 1.0
    names = ("routed_scaling_factor", "router_scaling_factor")
    return float(next((value for name in names if (value := getattr(config, name, None)) is not None), 1.0))


def _importance(content: Any) -> list[Row]:
    if isinstance(content, Mapping):
        for name in ("importance", "alpha"):
            if name in content:
                return _importance(content[name])
        if content and all(_is_modality(key) for key in content):
            columns = _by_modality(content)
            text, vision = (_column(column) for column in columns)
            if len(text) != len(vision):
                raise PlanError(f"{len(text)} layers for text, {len(vision)} for vision.")
            return list(zip(text, vision, strict=True))
        return [_row(value) for value in _in_layer_order(content)]
    if isinstance(content, Sequence) and not isinstance(content, str) and content:
        return [_row(value) for value in content]
    raise PlanError(f"got {_describe(content)}.")


def _row(value: Any) -> Row:
    if isinstance(value, Mapping):
        text, vision = _by_modality(value)
        return _number(text), _number(vision)
    if isinstance(value, list) and len(value) != 1:
        if len(value) != 2:
            raise PlanError(f"each layer has {_describe(value)}, expected a number or (text, vision).")
        return _number(value[0]), _number(value[1])
    return _number(value), _number(value)


def _column(value: Any) -> list[float]:
    if isinstance(value, Mapping):
        value = _in_layer_order(value)
    if not isinstance(value, list) or not value:
        raise PlanError(f"a modality has {_describe(value)}, expected a number for each layer.")
    return [_number(item) for item in value]


def _in_layer_order(content: Mapping[Any, Any]) -> list[Any]:
    by_layer: dict[int, Any] = {}
    for key, value in content.items():
        numbers = re.findall(r"-?\d+", str(key))
        if isinstance(key, (bool, float)) or len(numbers) != 1 or int(numbers[0]) < 0 or int(numbers[0]) in by_layer:
            raise PlanError(f"{key!r} is no layer, or one named twice.")
        by_layer[int(numbers[0])] = value
    if not by_layer:
        raise PlanError("it is empty.")
    return [by_layer[layer] for layer in sorted(by_layer)]


def _is_modality(key: Any) -> bool:
    return isinstance(key, str) and key in _NAMES


def _by_modality(content: Mapping[Any, Any]) -> list[Any]:
    """Return the value for text and that for vision."""
    found: list[list[Any]] = [[], []]
    for key, value in content.items():
        if not _is_modality(key):
            raise PlanError(f"{key!r} is no modality; known: {', '.join(_NAMES)}.")
        found[_NAMES[key]].append(value)
    for modality, values in zip(MODALITIES, found, strict=True):
        if len(values) != 1:
            raise PlanError(f"{len(values)} values for {modality}, expected one.")
    return [values[0] for values in found]


def _thresholds(content: Any) -> list[PlanPoint]:
    if isinstance(content, Mapping) and not any(str(key).startswith("tau") for key in content):
        points = [_point(value, _target(key)) for key, value in content.items()]
    else:
        points = [_point(value) for value in (content if isinstance(content, list) else [content])]
    targets = [point.target for point in points]
    if not points or (len(points) > 1 and None in targets) or len(set(targets)) != len(targets):
        raise PlanError(f"{len(points)} pairs of thresholds with targets {targets}: expected a target for each, no two alike.")
    return points


def _point(content: Any, target: float | None = None) -> PlanPoint:
    if not isinstance(content, Mapping):
        raise PlanError(f"got {_describe(content)}, expected a dict with tau_text and tau_vision.")
    taus = {key.removeprefix("tau_"): value for key, value in content.items() if isinstance(key, str) and key.startswith("tau")}
    if not taus:
        raise PlanError(f"got {_describe(content)}, expected tau_text and tau_vision among them.")
    text, vision = (_number(value) for value in _by_modality(taus))
    stated = [_number(content[name]) for name in _TARGETS if name in content]
    if len(stated) + (target is not None) > 1:
        raise PlanError(f"a pair of thresholds has several targets: {[*stated, *([] if target is None else [target])]}.")
    return PlanPoint(stated[0] if stated else target, text, vision)


def _target(key: Any) -> float:
    try:
        return float(key)
    except (TypeError, ValueError):
        raise PlanError(f"{key!r} is no target skip ratio.") from None


def _number(value: Any) -> float:
    while isinstance(value, list) and len(value) == 1:  # a tensor of one element
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PlanError(f"got {_describe(value)} where a number is expected.")
    return float(value)


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict with the keys {', '.join(repr(key) for key in list(value)[:6])}{', ...' if len(value) > 6 else ''}"
    if isinstance(value, list):
        return f"a list of {len(value)}{f', first {_describe(value[0])}' if value else ''}"
    return f"{value!r}"
