"""Reduce-k: a smaller K for every token."""

from __future__ import annotations

import math

from torch import Tensor

from modes_fx.policies.ranks import ranks
from modes_fx.policies.rule import Rule


def among_largest(weights_TK: Tensor, bound_T: Tensor) -> Tensor:
    """Keep a token's ``bound`` largest weights. Ties go to the earlier expert of the router's list."""
    return (ranks(weights_TK) < bound_T.unsqueeze(1)) & (weights_TK > -math.inf)


RULE = Rule(among_largest, keep_all=math.inf, skip_all=0.0)
