"""DiEP's skipping: NAEE's, easier on experts that are unlike the token's first.

The table is the similarity of two experts (CKA of what they compute) over the layer's mean similarity, 1 for an expert and
itself; ``modes_fx.measure.compare.statistics`` measures it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modes_fx.policies.ranks import at_or_after, tail_sums
from modes_fx.policies.rule import Rule


def tail_at_least_similar_share(weights_TK: Tensor, bound_T: Tensor, expert_ids_TK: Tensor, table_EE: Tensor) -> Tensor:
    """Drop ranks i to K for the smallest i whose weights sum to less than ``bound * table[first, i]`` of all K.

    The more alike the expert of rank i and the token's first, the more is dropped.
    Source: DiEP, arXiv 2509.16105, generalised from K = 2 like NAEE.
    """
    tails_TK, behind = tail_sums(weights_TK), at_or_after(weights_TK)
    first_T1 = torch.where(behind.all(dim=2), expert_ids_TK, 0).sum(dim=1, keepdim=True)
    share_TK = bound_T.unsqueeze(1) * table_EE[first_T1, expert_ids_TK]
    enough = tails_TK >= share_TK * tails_TK.amax(dim=1, keepdim=True)
    # Shares differ by rank, so that a rank may pass where one in front of it did not: all in front must.
    return (enough.unsqueeze(1) | ~behind.transpose(1, 2)).all(dim=2) & (weights_TK > -math.inf)


RULE = Rule(tail_at_least_similar_share, keep_all=0.0, skip_all=math.inf)
