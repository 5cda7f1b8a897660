"""Reduce-k: a smaller K for every token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modes_fx.policies.ranks import at_or_after
from modes_fx.policies.rule import Rule


def among_largest(weights_TK: Tensor, bound_T: Tensor) -> Tensor:
    """Keep a token's ``bound`` largest weights. Ties go to the earlier expert of the router's list."""
    behind = at_or_after(weights_TK).sum(dim=2, dtype=torch.float32)  # K for the largest, 1 for the smallest
    rank = weights_TK.shape[1] - behind
    return (rank < bound_T.unsqueeze(1)) & (weights_TK > -math.inf)


RULE = Rule(among_largest, keep_all=math.inf, skip_all=0.0)
