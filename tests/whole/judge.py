"""The oracle of the whole way: any rule, thresholds of each phase, budgets and protected tokens; written without modes_fx."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests import oracle

NEAR = 2e-5
"""What differs by less, relative to what it is compared with, may be decided either way: routing weights are rounded."""


class Undecided(Exception):
    """A case that may end one way or the other."""


@dataclass
class Steered:
    """A budget, followed with plain numbers: see ``NOTE [how it steers]`` in ``modes_fx/budget.py``.

    Attributes:
        rows: [L, G, 2], bounds for (text, vision) at each position of the path.
        shares: [L, G, 2], what each is expected to skip.
        aim: The target.
        feedback: Whether layers learn what those in front of them dropped.
    """

    rows: list[Any]
    shares: list[Any]
    aim: float
    feedback: bool
    base: int = field(init=False)
    owed: float = field(init=False)

    def bounds(self, layer: int, counts: Sequence[int]) -> list[float]:
        if layer == 0:
            self.base, self.owed = self._position(0, self.aim * len(self.rows) * sum(counts), counts), 0.0
        wanted = self._ahead(layer, self.base, counts) + self.owed
        return list(self.rows[layer][self._position(layer, wanted, counts)])

    def note(self, layer: int, counts: Sequence[int], kept: int, top_k: int) -> None:
        expected = sum(share * count for share, count in zip(self.shares[layer][self.base], counts, strict=True))
        self.owed += (expected - sum(counts) + kept / top_k) * self.feedback

    def _ahead(self, layer: int, position: int, counts: Sequence[int]) -> float:
        return sum(share * count for left in self.shares[layer:] for share, count in zip(left[position], counts, strict=True))

    def _position(self, layer: int, wanted: float, counts: Sequence[int]) -> int:
        expected = [self._ahead(layer, position, counts) for position in range(len(self.rows[layer]))]
        found = {
            next((position for position, share in enumerate(expected) if share >= wanted + off), len(expected) - 1)
            for off in (-1e-3, 0.0, 1e-3)
        }
        if len({tuple(self.rows[layer][position]) for position in found}) > 1:
            raise Undecided("between two positions of a budget")
        return next((position for position, share in enumerate(expected) if share >= wanted), len(expected) - 1)


class Judge(oracle.Oracle):
    """An oracle of a rule.

    Args:
        model: See ``Oracle``; so is ``dtype``.
        rule: Its name.
        phased: [2, L, 2], bounds for (prefill, decode) and (text, vision).
        tables: The rule's, one a layer.
        steered: What sets the bounds of prefills instead.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: str,
        phased: Tensor,
        dtype: torch.dtype,
        tables: Sequence[Tensor | None],
        steered: Steered | None = None,
    ) -> None:
        super().__init__(model, None, dtype)
        self.rule, self.phased, self.tables, self.steered = rule, phased.double(), tables, steered
        self._mine: Tensor | None = None
        if rule == "mc_moe":
            self._watch_attention()

    def _silence(self, layer: int, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            hidden, ids, weights_TK = (*args, *kwargs.values())
            classes, phase = self._told(name, len(weights_TK))
            counts = [int((classes == modality).sum()) for modality in range(2)]
            steered = self.steered if phase == 0 else None
            given = self.phased[phase, layer].tolist() if steered is None else steered.bounds(layer, counts)
            padding = 0.0 if self.rule in ("reduce_k", "top_p") else math.inf
            left = self._decide(weights_TK, ids, torch.tensor([*given, padding]).double()[classes], layer)
            if self._mine is not None and phase == 0:
                left = torch.where(self._mine.flatten()[:, None], weights_TK.double(), left)
            keep = ~left.isnan()
            if steered is not None:
                steered.note(layer, counts, int(keep.sum()), weights_TK.shape[1])
            for modality in range(2):
                mine = classes == modality
                self.routed[layer, modality, phase] += counts[modality] * weights_TK.shape[1]
                self.kept[layer, modality, phase] += int(keep[mine].sum())
            return (hidden, ids, left.nan_to_num(0.0).to(weights_TK.dtype)), {}

        return hook

    def _decide(self, weights: Tensor, ids: Tensor, bound: Tensor, layer: int) -> Tensor:
        table, exact = self.tables[layer], weights.double()
        ways = [_survivors(self.rule, exact, ids, bound, table)]
        if self.rule not in ("random", "reduce_k"):
            ways += [_survivors(self.rule, exact, ids, bound * factor, table) for factor in (1 - NEAR, 1 + NEAR)]
        if self.rule != "random":  # weights that are nearly alike may rank either way
            order = torch.linspace(-NEAR, NEAR, weights.shape[1], dtype=torch.float64)
            ways += [_survivors(self.rule, exact * (1 + tilt), ids, bound, table) for tilt in (order, -order)]
        if any(not way.isnan().equal(ways[0].isnan()) for way in ways[1:]):
            raise Undecided("a weight at its threshold")
        return ways[0]

    def _watch_attention(self) -> None:
        self.model.set_attn_implementation("eager")
        for module in self.model.modules():
            if hasattr(module, "self_attn") and any(part in self._experts for part in module.modules()):
                module.register_forward_pre_hook(self._enter, with_kwargs=True)
                module.self_attn.register_forward_hook(self._attended)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hidden = (args or (kwargs["hidden_states"],))[0]

    def _attended(self, module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        classes, phase = self._told("", self._hidden.shape[0] * self._hidden.shape[1])
        if phase:
            self._mine = None
            return
        real = classes.view(self._hidden.shape[:2]) != 2
        self._mine = torch.zeros_like(real)
        for row in range(len(real)):
            here = real[row].nonzero().flatten().tolist()
            scores = oracle.token_importance(self._hidden[row], output[1][row], here)
            ranked, count = sorted(here, key=lambda token: -scores[token]), math.ceil(0.02 * len(here))
            if len(here) > count and scores[ranked[count - 1]] * (1 - 10 * NEAR) < scores[ranked[count]]:
                raise Undecided("two tokens that matter alike")
            self._mine[row, ranked[:count]] = True


def _survivors(rule: str, weights: Tensor, ids: Tensor, bound: Tensor, table: Tensor | None) -> Tensor:
    """Return float64 [T, K]: the weights that survive; NaN where a pair is dropped."""
    dropped = torch.full_like(weights, math.nan)
    if rule == "threshold":
        return torch.where(weights >= bound[:, None], weights, dropped)
    if rule == "reduce_k":
        return torch.where(oracle.largest(weights, bound), weights, dropped)
    left = oracle.decide("naee" if rule == "mc_moe" else rule, weights, ids, bound, table)
    return left if rule == "top_p" else torch.where(bound[:, None].isinf(), dropped, left)
