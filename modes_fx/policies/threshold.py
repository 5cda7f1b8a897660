"""MoDES, and what it is made of: threshold only, GMLG, DMT and tempered GMLG differ in the bounds alone."""

from __future__ import annotations

import math

from torch import Tensor

from modes_fx.policies.rule import Rule


def at_least_threshold(weights_TK: Tensor, bound_T: Tensor) -> Tensor:
    """Keep a pair whose dispatched weight reaches its token's threshold (MoDES: GMLG and DMT folded to one comparison).

    ``alpha[l, m]**gamma * pi >= tau_m`` is ``pi >= tau_m / alpha[l, m]**gamma``; the quotient is the bound.
    Source: MoDES, arXiv 2511.15690.
    """
    return weights_TK >= bound_T.unsqueeze(1)


RULE = Rule(at_least_threshold, keep_all=0.0, skip_all=math.inf)
