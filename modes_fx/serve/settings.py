"""What a server was asked to skip, and the thresholds of its layers. Knows nothing of vLLM."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modes_fx.errors import PlanError, ServingError
from modes_fx.plan import SkipPlan
from modes_fx.serve.plugin import KEY

_FIELDS = ("plan", "target", "decode_target")
_NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Settings:
    """What stands under ``"modes_fx"`` in vLLM's additional config.

    Attributes:
        plan: The plan; its file is read where the server and each of its workers start.
        target: Skip ratio, as ``modes_fx.optimize`` takes it; None is the plan's largest.
        decode_target: The same for generated tokens alone; None is that of ``target``.

    Raises:
        ServingError: The plan cannot be served.
        PlanError: It has no such target.
    """

    plan: SkipPlan
    target: float | None = None
    decode_target: float | None = None

    def __post_init__(self) -> None:
        if self.plan.mode == "budget":
            raise ServingError(
                'A plan with mode "budget" cannot be served: its thresholds follow one prompt, and a batch of a server holds '
                'many. Save it with fixed thresholds: dataclasses.replace(plan, mode="fixed").save(path).'
            )
        if self.plan.rule != "threshold":
            raise ServingError(
                f"A plan with the keep-rule {self.plan.rule!r} cannot be served, only thresholds can. Search for a plan with "
                "modes-fx search."
            )
        if self.plan.alpha is not None and len(self.plan.layers) != len(self.plan.alpha):
            raise ServingError("The plan does not name the layers that its importance belongs to. Search for it again.")
        self.plan.point(self.target)
        self.plan.point(self.decode_target)

    def with_targets(self, target: float | None, decode_target: float | None) -> Settings:
        """Return settings with other targets, each as it is set at the start.

        Raises:
            PlanError: The plan has no such target.
        """
        return Settings(self.plan, _number("target", target), _number("decode_target", decode_target))

    def bounds(self, names: Sequence[str]) -> Tensor:
        """Return the thresholds of layers on the weights that their routers give.

        Args:
            names: Paths of the layers' experts, as vLLM or transformers names them: what counts is the layer's number.

        Returns:
            float32 [layers, 2 phases (prefill, decode), 2 modalities (text, vision)].

        Raises:
            ServingError: A layer has no number, or not one of its own, or the plan knows none such.
        """
        rows = len(self.plan.alpha) if self.plan.alpha is not None else 1
        both = [self.target, self.target if self.decode_target is None else self.decode_target]
        table = torch.stack([self.plan.bounds(rows, target) for target in both], dim=1)
        numbers = layer_numbers(names)
        if self.plan.alpha is None:
            return table.expand(len(numbers), 2, 2).clone()
        known = {number: row for row, number in enumerate(layer_numbers(self.plan.layers))}
        if missing := [name for name, number in zip(names, numbers, strict=True) if number not in known]:
            raise ServingError(f"The plan has no thresholds for {missing[0]}: its layers are {_listed(known)}.")
        return table[[known[number] for number in numbers]]

    def check_layers(self, numbers: Sequence[int], start: int, end: int) -> None:
        """Refuse a model that lacks MoE layers which the plan knows.

        Args:
            numbers: Of the MoE layers that a worker found.
            start: The first decoder layer that the worker holds.
            end: One past the last.

        Raises:
            ServingError: One is missing.
        """
        wanted = layer_numbers(self.plan.layers) if self.plan.alpha is not None else []
        if missing := [number for number in wanted if start <= number < end and number not in numbers]:
            raise ServingError(
                f"The plan has thresholds for layer {missing[0]}, where the model has no experts to choose from."
            )


def read_settings(additional: Mapping[str, Any]) -> Settings:
    """Read the settings from vLLM's additional config, which has some.

    Raises:
        ServingError: An unknown key, a value of the wrong type, or a plan that cannot be served.
        PlanError: The plan is unreadable, or has no such target.
    """
    given = additional[KEY]
    if not isinstance(given, Mapping) or not isinstance(given.get("plan"), str):
        raise ServingError(
            f'"{KEY}" in --additional-config is an object with a "plan", the path of a plan file; got {given!r}.'
        )
    if unknown := sorted(set(map(str, given)) - set(_FIELDS)):
        raise ServingError(f'Unknown setting {unknown[0]!r} of "{KEY}" in --additional-config; known: {", ".join(_FIELDS)}.')
    targets = {name: _number(name, given.get(name)) for name in _FIELDS[1:]}
    return Settings(SkipPlan.load(given["plan"]), **targets)


def checked_target(given: Mapping[str, Any]) -> dict[str, float | None]:
    """Return both targets of a request to change them.

    Raises:
        PlanError: It says something else, or no numbers.
    """
    if unknown := sorted(set(map(str, given)) - set(_FIELDS[1:])):
        raise PlanError(f"Unknown field {unknown[0]!r}; known: {', '.join(_FIELDS[1:])}.")
    return {name: _number(name, given.get(name)) for name in _FIELDS[1:]}


def layer_numbers(names: Sequence[str]) -> list[int]:
    """Return the number of each layer, such as 3 for ``model.layers.3.mlp.experts``.

    Raises:
        ServingError: A name holds no number or several, or two layers share one.
    """
    numbers = []
    for name in names:
        found = _NUMBER.findall(name)
        if len(found) != 1:
            raise ServingError(f"Cannot tell which layer {name} is: its name holds {len(found)} numbers. It cannot be served.")
        if int(found[0]) in numbers:
            raise ServingError(f"Layer {found[0]} has experts in several places, such as {name}. It cannot be served.")
        numbers.append(int(found[0]))
    return numbers


def _number(name: str, value: Any) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise PlanError(f"A {name} is a skip ratio in [0, 1], got {value!r}.")
    return value


def _listed(numbers: Mapping[int, int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
