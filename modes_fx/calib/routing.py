"""The routing weights of the unskipped model: what thresholds will be compared with.

NOTE [histograms, not samples] Counts in fixed bins add up exactly: any number of batches or processes, in any order, gives the
same counts, and so the same grid of thresholds. A bin is a float32 cut off after its first 16 bits, which is a bfloat16: the
finest step that the dispatched weights of a bfloat16 model can differ by, 0.4 to 0.8% of the value.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from modes_fx import modality
from modes_fx.calib import processes
from modes_fx.modality import MODALITIES
from modes_fx.optimize import optimized_state

_DROPPED_BITS = 16
BINS = 1 << (31 - _DROPPED_BITS)  # of all non-negative floats


class RoutingRecorder:
    """Counts the dispatched weights of forwards run inside its ``with`` block, uncompiled.

    Attributes:
        counts: int64 [L, modalities, BINS], weights by layer and by their token's modality; after the block those of all
            processes. ``bin_centres()`` says what a bin stands for.

    Args:
        model: An optimised model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._state = optimized_state(model)
        self.counts = torch.zeros(len(self._state.layers), len(MODALITIES), BINS, dtype=torch.int64)

    def __enter__(self) -> RoutingRecorder:
        self._state.regions.suspend()
        self._handles = [
            layer.experts.register_forward_pre_hook(self._hook(index), with_kwargs=True)
            for index, layer in enumerate(self._state.layers)
        ]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._state.regions.resume()
        if error is None:
            self.counts = processes.total(self.counts)

    @property
    def pairs(self) -> list[int]:
        """Routed pairs of each modality's tokens."""
        return [int(pairs) for pairs in self.counts.sum(dim=(0, 2))]

    def scores(self, modality_index: int, factors: list[float]) -> tuple[Tensor, Tensor]:
        """Return the distribution of one modality's scores, ``factor of the layer * weight``.

        Args:
            modality_index: Of ``MODALITIES``.
            factors: One for each layer, such as ``alpha**gamma``.

        Returns:
            Scores, float64 [n] ascending, and how many pairs have each, int64 [n].
        """
        layers, bins = self.counts[:, modality_index].nonzero(as_tuple=True)
        scores = torch.tensor(factors, dtype=torch.float64)[layers] * bin_centres()[bins]
        order = scores.argsort(stable=True)
        return scores[order], self.counts[layers, modality_index, bins][order]

    def quantiles(self, size: int = 65) -> tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]:
        """Return, for each layer and modality, weights at equal steps of rank from the smallest to the largest.

        Args:
            size: How many. All are 0 where a modality is absent.
        """
        below = self.counts.cumsum(dim=2)
        ranks = (torch.linspace(0, 1, size, dtype=torch.float64) * below[..., -1:]).ceil().clamp(min=1)
        bins = torch.searchsorted(below, ranks.long())
        values = torch.where(below[..., -1:] > 0, bin_centres()[bins.clamp(max=BINS - 1)], 0.0)
        rows = [[tuple(float(f"{value:.6g}") for value in column) for column in row] for row in values.tolist()]
        return tuple((text, vision) for text, vision in rows)

    def _hook(self, layer: int) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            weights_TK = args[2] if len(args) > 2 else kwargs["top_k_weights"]
            tokens = modality.running()
            if tokens is None:
                return
            classes = tokens.flat(len(weights_TK), weights_TK.device)
            bins_TK = bin_of(weights_TK)
            for index in range(len(MODALITIES)):
                self.counts[layer, index] += torch.bincount(bins_TK[classes == index].reshape(-1), minlength=BINS).cpu()

        return record


def bin_of(weights: Tensor) -> Tensor:
    """Return the bin of each weight, int64; anything below 0 is in the first, with 0."""
    return (weights.float().clamp(min=0).view(torch.int32) >> _DROPPED_BITS).to(torch.int64)


def bin_centres() -> Tensor:
    """Return the middle of each bin, float64 [BINS].

    No bfloat16 weight is the middle of a bin, so that rounding in a threshold does not decide which pairs it skips.
    """
    bins = torch.arange(BINS, dtype=torch.int32)
    return ((bins << _DROPPED_BITS) + (1 << (_DROPPED_BITS - 1))).view(torch.float32).double()
