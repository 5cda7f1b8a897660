"""Intervals over samples, by a paired bootstrap; over models, of which there are few, by Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

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


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the 95% interval of the mean of which these are draws, by Student's t; of numbers that are all >= 0.

    It rests on draws that are independent and about normal. The end below 0 of such numbers' interval is 0.

    Args:
        values: One number a model. A single one tells nothing of the others: NaN.
    """
    if len(values) < 2:
        return math.nan, math.nan
    mean = statistics.fmean(values)
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return max(mean - half, 0.0), mean + half


def t_quantile(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t; from 11 degrees of freedom on by its expansion, within 1e-3."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return float(z + sum(term / freedom**power for power, term in enumerate(terms, start=1)))


_T = (12.70620, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814)
