"""NAEE's dynamic skipping in the form that MoDES generalises it to: any K, weights kept as they are."""

from __future__ import annotations

import math

from torch import Tensor

from modes_fx.policies.ranks import tail_sums
from modes_fx.policies.rule import Rule


def tail_at_least_share(weights_TK: Tensor, bound_T: Tensor) -> Tensor:
    """Drop ranks i to K of a token for the smallest i whose weights sum to less than the share ``bound`` of all K.

    A bound up to 1 keeps rank 1 at least, any above drops everything.
    Source: NAEE, arXiv 2402.14800, as generalised in MoDES, arXiv 2511.15690.
    """
    tails_TK = tail_sums(weights_TK)  # they fall with the rank, so that no rank behind a dropped one is kept
    whole_T1 = tails_TK.amax(dim=1, keepdim=True)  # rank 1's tail, bit by bit: a bound of 1 keeps it
    return (tails_TK >= bound_T.unsqueeze(1) * whole_T1) & (weights_TK > -math.inf)


RULE = Rule(tail_at_least_share, keep_all=0.0, skip_all=math.inf)
