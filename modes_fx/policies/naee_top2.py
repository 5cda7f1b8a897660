"""NAEE's dynamic skipping as published, for two experts a token: the second goes if it is small beside the first."""

from __future__ import annotations

import math

from torch import Tensor

from modes_fx.policies.ranks import at_or_after
from modes_fx.policies.rule import Rule
from modes_fx.policies.survivors import taking_over


def at_least_ratio_to_first(weights_TK: Tensor, bound_T: Tensor) -> tuple[Tensor, Tensor]:
    """Drop a rank behind the first if its weight is below ``bound`` times the largest; survivors take over the whole sum.

    Published for K = 2 (``w_2 < beta * w_1``); for a larger K each rank is compared alike. Rank 1 stays under any finite bound,
    so that at most 1 - 1/K is skipped. Source: NAEE, arXiv 2402.14800.
    """
    bound_T1, present = bound_T.unsqueeze(1), weights_TK > -math.inf
    mass_TK = weights_TK.clamp(min=0)
    first = at_or_after(weights_TK).all(dim=2) & (bound_T1 < math.inf)
    keep = ((mass_TK >= bound_T1 * mass_TK.amax(dim=1, keepdim=True)) | first) & present
    return keep, taking_over(keep, weights_TK)


RULE = Rule(at_least_ratio_to_first, keep_all=0.0, skip_all=math.inf)
