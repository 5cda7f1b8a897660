"""Intervals over samples, by a paired bootstrap."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Interval = tuple[float, float]


def ratio_interval(over_S: Tensor, under_S: Tensor, *, seed: int = 0, rounds: int = 2000, level: float = 0.95) -> Interval:
    """Return the percentile interval of ``over.sum() / under.sum()`` when samples are drawn anew with replacement.

    Both sums are taken over the same draws, so that what a sample contributes to either stays paired. Equal seeds draw equal
    samples, so that rules measured on the same data are compared on the same draws.

    Args:
        over_S: One number a sample.
        under_S: The same; ones make the ratio a mean.
        seed: Of the draws.
        rounds: How many draws.
        level: Share of draws inside the interval.

    Returns:
        Its ends; NaN where a denominator is 0 in every draw.
    """
    generator = torch.Generator().manual_seed(seed)
    size = len(over_S)
    ratios = []
    for first in range(0, rounds, 100):  # a hundred draws at a time: a whole table of them may not fit
        drawn = torch.randint(size, (min(100, rounds - first), size), generator=generator)
        under = under_S.double()[drawn].sum(dim=1)
        ratios.append(over_S.double()[drawn].sum(dim=1)[under > 0] / under[under > 0])
    values = torch.cat(ratios)
    if not len(values):
        return math.nan, math.nan
    tail = (1 - level) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
