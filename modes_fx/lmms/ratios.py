"""The share of expert calls that a run skipped, as measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from modes_fx.errors import NotOptimizedError
from modes_fx.modality import MODALITIES
from modes_fx.optimize import optimized_state
from modes_fx.report import PHASES, SkipStats


def live_stats(model: Any) -> SkipStats | None:
    """Return the statistics of an optimised model, None for a stock one."""
    try:
        return optimized_state(model).runtime.stats
    except NotOptimizedError:
        return None


@contextlib.contextmanager
def measured(model: Any) -> Iterator[dict[str, float]]:
    """Measure what is skipped inside a block, whatever was counted before it.

    Yields:
        A dictionary that is filled when the block ends; see ``skip_ratios``. It stays empty for a stock model.
    """
    ratios: dict[str, float] = {}
    stats = live_stats(model)
    if stats is None:
        yield ratios
        return
    routed, kept = stats.pairs_routed, stats.pairs_kept
    with stats.counting():
        yield ratios
    ratios.update(skip_ratios(stats.pairs_routed - routed, stats.pairs_kept - kept))


def skip_ratios(routed: Tensor, kept: Tensor) -> dict[str, float]:
    """Return dropped / routed pairs, in [0, 1]: in all, by modality, by phase; those without any pair are left out.

    Args:
        routed: int64 [layers, modalities, phases], as ``SkipStats.pairs_routed``.
        kept: int64, same shape.
    """
    selected: dict[str, Any] = {"skip_ratio": ...}
    selected |= {f"skip_ratio_{modality}": (slice(None), index) for index, modality in enumerate(MODALITIES)}
    selected |= {f"skip_ratio_{phase}": (..., index) for index, phase in enumerate(PHASES)}
    pairs = {name: (int(routed[part].sum()), int(kept[part].sum())) for name, part in selected.items()}
    return {name: 1 - stayed / came for name, (came, stayed) in pairs.items() if came}
