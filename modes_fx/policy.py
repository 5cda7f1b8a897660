"""Keep-rules: which of a token's top-k experts are computed.

A rule is a plain function of tensors. The pass inserts its operations in the graph before the dispatch, where Inductor
fuses them; the bounds come in as a tensor at call time, so changing them never recompiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

KeepRule = Callable[[Tensor, Tensor], Tensor]
"""``rule(weights_TK, bound_T) -> keep_TK``: float32 [T, K] and float32 [T] to bool [T, K].

A weight of minus infinity marks a pair that has no expert: no rule keeps it, whatever the bound.
"""


def at_least_threshold(weights_TK: Tensor, bound_T: Tensor) -> Tensor:
    """Keep a pair whose dispatched weight reaches its token's threshold (MoDES: GMLG and DMT folded to one comparison).

    ``alpha[l, m]**gamma * pi >= tau_m`` is ``pi >= tau_m / alpha[l, m]**gamma``; the quotient is the bound.
    Source: MoDES, arXiv 2511.15690.
    """
    return weights_TK >= bound_T.unsqueeze(1)


def among_largest(weights_TK: Tensor, bound_T: Tensor) -> Tensor:
    """Keep a token's ``bound`` largest weights (Reduce-k). Ties go to the earlier expert of the router's list."""
    larger = weights_TK.unsqueeze(1) > weights_TK.unsqueeze(2)  # [T, k, j]: j beats k
    tied_before = (weights_TK.unsqueeze(1) == weights_TK.unsqueeze(2)).tril(diagonal=-1)
    rank = (larger | tied_before).sum(dim=2, dtype=torch.float32)
    return (rank < bound_T.unsqueeze(1)) & (weights_TK > -math.inf)


def keep_pairs(rule: KeepRule, weights_S: Tensor, token_class: Tensor, bounds: Tensor, top_k: int) -> Tensor:
    """Apply a rule to dispatched weights, in float32 whatever their dtype: thresholds are never rounded.

    Args:
        rule: The rule.
        weights_S: [T * K], token by token.
        token_class: int64 [T].
        bounds: float32 [number of classes].
        top_k: K.

    Returns:
        bool [T, K].
    """
    return rule(weights_S.reshape(-1, top_k).float(), bounds[token_class])


@dataclass(frozen=True)
class Rule:
    """A keep-rule and the bounds at its two ends.

    Attributes:
        keep: Decides the pairs.
        keep_all: A bound that keeps every pair.
        skip_all: A bound that skips every pair, for padding.
    """

    keep: KeepRule
    keep_all: float
    skip_all: float


RULES = {
    "threshold": Rule(at_least_threshold, keep_all=0.0, skip_all=math.inf),
    "reduce_k": Rule(among_largest, keep_all=math.inf, skip_all=0.0),
}
