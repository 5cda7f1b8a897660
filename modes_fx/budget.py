"""Thresholds that move with the input, so that each prefill skips what was asked for.

Fixed thresholds reach their skip ratio on average over the calibration data. One input skips more or less: it holds more text,
or its router is surer of itself. A plan whose ``mode`` is ``"budget"`` keeps that input's own ratio at the target. Beside the
thresholds it needs quantiles of the unskipped model's routing weights, which tell what any bound is expected to skip, layer by
layer and for each modality. ``benchmarks/budget.py`` measures what it does to ratio and loss.

NOTE [how it steers] All bounds lie on one path from keeping all to skipping all, through those points of the plan's frontier
that have the gamma of the target's point and ascend with it in both thresholds: a position in between lies, bound for bound,
between two sets of thresholds that were measured. At the first layer of a forward the position is the one that is expected to
reach the target for its numbers of text and visual tokens. After each layer the pairs dropped are compared with those expected,
and the layers that are left take the position that is expected to make up for the difference.

All of that stays on the device, as inputs of the compiled regions: nothing synchronises and nothing is compiled anew. Where one
region holds all layers, their bounds are needed before the first has run, and only the first step is taken. Decode steps keep
fixed thresholds: the few pairs of a step are no sample to steer by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from modes_fx.errors import PlanError
from modes_fx.modality import MODALITIES, Tokens
from modes_fx.plan import PlanPoint, SkipPlan

_POSITIONS = 64


@dataclass
class _Forward:
    """One forward on its way: what it was steered by so far.

    Attributes:
        budget: Steers it.
        tokens: Those of the forward.
        layer: Last layer that was asked for.
        counts: float32 [2], its text and visual tokens.
        base: int64 [1], position that is expected to meet the target.
        owed: float32 [1], pairs that should have been dropped and were not, in units of K.
    """

    budget: Budget
    tokens: Tokens
    layer: int
    counts: Tensor
    base: Tensor
    owed: Tensor

    def move(self, device: torch.device) -> None:
        """Follow the layers to the device that they are on."""
        if self.owed.device != device:
            self.counts, self.base, self.owed = (each.to(device) for each in (self.counts, self.base, self.owed))


_forward: ContextVar[_Forward | None] = ContextVar("modes_fx_budgeted_forward", default=None)


class Budget:
    """Bounds for ``ModelRuntime.set_bounds`` that follow a target.

    Args:
        fixed: float32 [2, L, 2], bounds for (prefill, decode) and (text, vision); those of decode steps are in force.
        path: float32 [G, L, 2], bounds that ascend over the positions.
        shares: float32 [G, L, 2], skip ratios that each is expected to give; they ascend too.
        aim: Skip ratio to keep each prefill at.
    """

    def __init__(self, fixed: Tensor, path: Tensor, shares: Tensor, aim: float) -> None:
        self.fixed = fixed
        self.aim = aim
        padding = torch.full_like(path[..., :1], math.inf)
        rows_LGC = torch.cat([path, padding], dim=2).transpose(0, 1).contiguous()
        shares_LGM = shares.transpose(0, 1).contiguous()
        ahead_LGM = shares_LGM.flip(0).cumsum(0).flip(0)  # of a layer and all after it
        self._tables = {torch.device("cpu"): list(zip(rows_LGC, shares_LGM, ahead_LGM, strict=True))}

    def row(self, layer: int, tokens: Tokens, token_class: Tensor) -> Tensor:
        """Return a layer's bounds, float32 [classes], for the running forward.

        Args:
            layer: Index of the layer.
            tokens: The forward's tokens.
            token_class: int64 [T], their classes.
        """
        with torch.inference_mode(False):
            tables = self._on(token_class.device)
            rows_GC, _, ahead_GM = tables[layer]
            forward = _forward.get()
            if forward is None or forward.budget is not self or forward.tokens is not tokens or layer <= forward.layer:
                counts = torch.stack([(token_class == index).sum() for index in range(len(MODALITIES))]).float()
                wanted = self.aim * (len(tables) - layer) * counts.sum(dim=0, keepdim=True)
                base = torch.searchsorted(ahead_GM @ counts, wanted).clamp(max=len(rows_GC) - 1)
                forward = _Forward(self, tokens, layer, counts, base, torch.zeros_like(wanted))
                _forward.set(forward)
            forward.layer = layer
            forward.move(token_class.device)
            expected_G = ahead_GM @ forward.counts
            wanted = expected_G.index_select(0, forward.base) + forward.owed
            position = torch.searchsorted(expected_G, wanted).clamp(max=len(rows_GC) - 1)
            return rows_GC.index_select(0, position).view(-1)

    def note(self, layer: int, top_k: int, kept: Tensor) -> None:
        """Take note of what a layer kept.

        Args:
            layer: Index of the layer.
            top_k: K.
            kept: Pairs, an integer of one element.
        """
        forward = _forward.get()
        if forward is None or forward.budget is not self:
            return
        with torch.inference_mode(False):
            forward.move(kept.device)
            _, shares_GM, _ = self._on(kept.device)[layer]
            expected = shares_GM.index_select(0, forward.base) @ forward.counts
            forward.owed = forward.owed + expected - forward.counts.sum() + kept / top_k

    def _on(self, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return each layer's bounds [G, C], expected shares [G, 2] and, summed with those of all layers after it, [G, 2]."""
        if device not in self._tables:
            tables = self._tables[torch.device("cpu")]
            self._tables[device] = [(rows.to(device), shares.to(device), ahead.to(device)) for rows, shares, ahead in tables]
        return self._tables[device]


def budget_of(plan: SkipPlan, num_layers: int, fixed: Tensor, target: float | None) -> Budget:
    """Return the budget that a plan of mode ``"budget"`` asks for.

    Args:
        plan: The plan.
        num_layers: MoE layers of the model, L.
        fixed: float32 [L, 2] or [2, L, 2], the plan's bounds; see ``Budget``.
        target: See ``SkipPlan.point``. A target from the frontier is aimed at itself, not at what its point realised.

    Raises:
        PlanError: Unknown target, or the plan is for another number of layers.
    """
    if len(plan.weights) != num_layers:
        raise PlanError(f"The plan has routing weights of {len(plan.weights)} MoE layers, the model has {num_layers}.")
    point = plan.point(target)
    aim = target if target is not None else point.target
    if aim is None:
        raise PlanError("A budget needs a target skip ratio; this plan's thresholds were given by hand.")
    knots = [replace(plan, points=(item,)).bounds(num_layers) for item in _chain(plan, point)]
    weights_LMQ = torch.tensor(plan.weights, dtype=torch.float64)
    all_kept, all_skipped = torch.zeros_like(knots[0]), torch.full_like(knots[0], math.inf)
    path, shares = _fill([all_kept, *knots, all_skipped], weights_LMQ)
    with torch.inference_mode(False):
        return Budget(fixed.expand(2, -1, -1).clone(), path.clone(), shares.clone(), aim)


def _chain(plan: SkipPlan, point: PlanPoint) -> list[PlanPoint]:
    """Return the point among those of the frontier that ascend with it in both thresholds."""
    alike = sorted((other for other in plan.frontier if other.gamma == point.gamma), key=_taus)
    below, above = [point], [point]
    for other in alike:
        if all(new >= old for new, old in zip(_taus(other), _taus(above[-1]), strict=True)):
            above.append(other)
    for other in reversed(alike):
        if all(new <= old for new, old in zip(_taus(other), _taus(below[-1]), strict=True)):
            below.append(other)
    return [*reversed(below), *above[1:]]


def _taus(point: PlanPoint) -> tuple[float, float]:
    return point.tau_text, point.tau_vision


def _fill(knots: Sequence[Tensor], weights_LMQ: Tensor) -> tuple[Tensor, Tensor]:
    """Return bounds from knot to knot, in about equal steps of what they skip, and that share; float32 [G, L, 2] each."""
    path, shares = [knots[0]], [share_below(knots[0], weights_LMQ)]
    for low, high in pairwise(knots):
        first, last = shares[-1], share_below(high, weights_LMQ)
        steps = max(1, round(_POSITIONS * float((last - first).mean())))
        for step in range(1, steps):
            shares.append(torch.lerp(first, last, step / steps))
            path.append(bound_above(shares[-1], weights_LMQ).float().clamp(min=low, max=high))
        shares.append(last)
        path.append(high)
    return torch.stack(path), torch.stack(shares).float()


def share_below(bounds_LM: Tensor, weights_LMQ: Tensor) -> Tensor:
    """Return the share of routing weights below a bound, float64 [L, 2].

    Args:
        bounds_LM: One for each layer and modality, [L, 2].
        weights_LMQ: float64 [L, 2, Q], quantiles of the weights at Q equal steps from the smallest to the largest.
    """
    last = weights_LMQ.shape[2] - 1
    bounds = bounds_LM.double().unsqueeze(2)
    above = torch.searchsorted(weights_LMQ, bounds)
    low, high = (weights_LMQ.gather(2, index.clamp(0, last)) for index in (above - 1, above))
    share = (above - 1 + (bounds - low) / (high - low)) / last
    return torch.where(above == 0, 0.0, torch.where(above > last, 1.0, share)).squeeze(2)


def bound_above(shares_LM: Tensor, weights_LMQ: Tensor) -> Tensor:
    """Return the bound that a share of the weights lies below, the reverse of ``share_below``."""
    last = weights_LMQ.shape[2] - 1
    position = shares_LM.unsqueeze(2) * last
    index = position.long().clamp(max=last - 1)
    low, high = weights_LMQ.gather(2, index), weights_LMQ.gather(2, index + 1)
    return torch.lerp(low, high, position - index).squeeze(2)
