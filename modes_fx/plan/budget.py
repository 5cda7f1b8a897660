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

All of that is part of the forward's graph: nothing synchronises, and another budget compiles nothing. Decode steps keep fixed
thresholds: the few pairs of a step are no sample to steer by.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from modes_fx.errors import PlanError
from modes_fx.modality import MODALITIES
from modes_fx.plan import PlanPoint, SkipPlan

_POSITIONS = 64


class Budget:
    """Bounds that follow a target; see ``graph.runtime.Runtime.set_bounds``.

    Args:
        fixed: float32 [2, L, 2], bounds for (prefill, decode) and (text, vision); those of decode steps are in force.
        path: float32 [G, L, 2], bounds that ascend over the positions.
        shares: float32 [G, L, 2], skip ratios that each is expected to give; they ascend too.
        aim: Skip ratio to keep each prefill at.
    """

    def __init__(self, fixed: Tensor, path: Tensor, shares: Tensor, aim: float) -> None:
        self.fixed = fixed
        self.aim = aim
        # Positions beyond the end repeat it, so that graphs of fixed shapes serve paths of any usual length.
        beyond = -len(path) % _POSITIONS
        path, shares = (torch.cat([each, each[-1:].expand(beyond, -1, -1)]) for each in (path, shares))
        padding = torch.full_like(path[..., :1], math.inf)
        self._rows_LGC = torch.cat([path, padding], dim=2).transpose(0, 1).contiguous()
        self._shares_LGM = shares.transpose(0, 1).contiguous()
        self._ahead_LGM = self._shares_LGM.flip(0).cumsum(0).flip(0)  # of a layer and all after it

    def to(self, device: torch.device) -> Budget:
        """Return the same on a device."""
        moved = copy.copy(self)
        for name in ("_rows_LGC", "_shares_LGM", "_ahead_LGM"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved


class Steering:
    """One prefill on its way: what it was steered by so far.

    Args:
        budget: Steers it.
        classes: int64 [T], the classes of its tokens.
        layer: Index of the first layer that asks.
    """

    def __init__(self, budget: Budget, classes: Tensor, layer: int) -> None:
        self._budget = budget
        self._aim = budget.aim
        self._counts = torch.stack([(classes == index).sum() for index in range(len(MODALITIES))]).float()
        wanted = self._aim * (len(budget._ahead_LGM) - layer) * self._counts.sum(dim=0, keepdim=True)
        self._base = self._position(layer, wanted)  # int64 [1], the one that is expected to meet the target
        self._owed = torch.zeros_like(wanted)  # pairs that should have been dropped and were not, in units of K

    def row(self, layer: int) -> Tensor:
        """Return a layer's bounds, float32 [classes]."""
        self._follow(self._budget._rows_LGC.device)
        wanted = self._expected(layer).index_select(0, self._base) + self._owed
        return self._budget._rows_LGC[layer].index_select(0, self._position(layer, wanted)).view(-1)

    def note(self, layer: int, keep_TK: Tensor) -> None:
        """Take note of what a layer kept, bool [T, K]."""
        self._follow(keep_TK.device)
        shares_GM = self._budget._shares_LGM[layer].to(keep_TK.device)
        expected = shares_GM.index_select(0, self._base) @ self._counts
        self._owed = self._owed + expected - self._counts.sum() + keep_TK.sum() / keep_TK.shape[1]

    def _expected(self, layer: int) -> Tensor:
        return self._budget._ahead_LGM[layer] @ self._counts

    def _position(self, layer: int, wanted: Tensor) -> Tensor:
        expected_G = self._expected(layer)
        return torch.searchsorted(expected_G, wanted).clamp(max=expected_G.shape[0] - 1)

    def _follow(self, device: torch.device) -> None:
        """Go to the device where the layers are."""
        if self._owed.device != device:
            self._counts, self._base, self._owed = (each.to(device) for each in (self._counts, self._base, self._owed))


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
    weights_LMQ = torch.tensor(plan.weights, dtype=torch.float64, device="cpu")
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
