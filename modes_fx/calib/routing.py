"""The routing weights of the unskipped model: what thresholds will be compared with.

NOTE [histograms, not samples] Counts in fixed bins add up exactly: any number of batches or processes, in any order, gives the
same counts, and so the same grid of thresholds. A bin is a float32 cut off after its first 16 bits, which is a bfloat16: the
finest step that the dispatched weights of a bfloat16 model can differ by, 0.4 to 0.8% of the value.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from modes_fx.calib import processes
from modes_fx.graph.running import running
from modes_fx.modality import MODALITIES
from modes_fx.optimize import optimized_state

_DROPPED_BITS = 16
BINS = 1 << (31 - _DROPPED_BITS)  # of all non-negative floats


See = Callable[[int, Tensor, Tensor, Tensor], None]


@contextlib.contextmanager
def dispatches_shown(model: nn.Module, see: See) -> Iterator[None]:
    """Let forwards inside the block run uncompiled, and show what each MoE layer's router hands to its experts.

    Args:
        model: An optimised model.
        see: Called with the layer's index, hidden states [T, H], weights [T, K] and classes int64 [T] (text, vision, padding).
            Not called outside a forward of the model, where classes are unknown.
    """
    state = optimized_state(model)

    def hook(layer: int) -> Any:
        def show(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens = running()
            if tokens is None:
                return
            hidden, _, weights = list(inspect.signature(module.forward).bind(*args, **kwargs).arguments.values())[:3]
            hidden_TH = hidden.reshape(-1, hidden.shape[-1])
            weights_TK = weights.reshape(len(hidden_TH), -1)  # some code hands over flat ids and weights
            see(layer, hidden_TH, weights_TK, tokens.flat(len(weights_TK), weights_TK.device))

        return show

    state.runtime.suspended = True
    handles = [layer.experts.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(state.layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        state.runtime.suspended = False


class RoutingRecorder:
    """Counts the dispatched weights of forwards run inside its ``with`` block, uncompiled.

    Attributes:
        counts: int64 [L, modalities, BINS], weights by layer and by their token's modality; after the block those of all
            processes. ``bin_centres()`` says what a bin stands for.

    Args:
        model: An optimised model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.counts = torch.zeros(len(optimized_state(model).layers), len(MODALITIES), BINS, dtype=torch.int64)
        self._shown = dispatches_shown(model, self._count)

    def __enter__(self) -> RoutingRecorder:
        self._shown.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._shown.__exit__(kind, error, trace)
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

    def _count(self, layer: int, hidden_TH: Tensor, weights_TK: Tensor, classes_T: Tensor) -> None:
        bins_TK = bin_of(weights_TK)
        for index in range(len(MODALITIES)):
            self.counts[layer, index] += torch.bincount(bins_TK[classes_T == index].reshape(-1), minlength=BINS).cpu()


def bin_of(weights: Tensor) -> Tensor:
    """Return the bin of each weight, int64; anything below 0 is in the first, with 0."""
    return (weights.float().clamp(min=0).view(torch.int32) >> _DROPPED_BITS).to(torch.int64)


def bin_centres() -> Tensor:
    """Return the middle of each bin, float64 [BINS].

    No bfloat16 weight is the middle of a bin, so that rounding in a threshold does not decide which pairs it skips.
    """
    bins = torch.arange(BINS, dtype=torch.int32)
    return ((bins << _DROPPED_BITS) + (1 << (_DROPPED_BITS - 1))).view(torch.float32).double()
