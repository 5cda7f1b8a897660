"""Opportunistic expert activation: in a decode step a token's lesser experts are computed where others have them read anyway.

Source: arXiv 2511.02237, in its simple form: a baseline of the k0 largest of each token, and the token's other experts where
they are in the baseline of any, weights renormalised over what is computed. Adapted: a token takes on experts among its own K,
where the paper, which has the whole softmax, also goes down the ranks behind K; and survivors take over the sum that the K had,
which is renormalising where the router does. ``batch_threshold`` with a slack of 1 is the same idea with thresholds in the
place of k0, and keeps the weights.
"""

from __future__ import annotations

import math

from torch import Tensor

from modes_fx.policies.batches import read_by
from modes_fx.policies.ranks import ranks
from modes_fx.policies.rule import Rule
from modes_fx.policies.survivors import taking_over


def among_largest_or_read_anyway(
    weights_TK: Tensor, bound_T: Tensor, expert_ids_TK: Tensor, table_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Keep a token's ``bound`` largest weights, and what is left of its K where its expert is read for any token's.

    ::

        base    = rank < bound                                      rank 0 is the token's largest
        keep    = base  or  (an expert of any base pair  and  table[expert] > 0)

    The table says which experts may be taken on: 1, or 0 for Reduce-k on that expert. A token alone in its call, and padding,
    whose bound is 0, take on nothing. What is computed for a token depends on the tokens that share its call.
    """
    bound_T1 = bound_T.unsqueeze(1)
    base = (ranks(weights_TK) < bound_T1) & (weights_TK > -math.inf)
    free_E = read_by(base, expert_ids_TK, table_E.shape[0])[:-1] & (table_E > 0)
    keep = base | (free_E[expert_ids_TK] & (bound_T1 > 0) & (weights_TK > -math.inf))
    return keep, taking_over(keep, weights_TK)


def open_tables(num_layers: int, num_experts: int) -> tuple[tuple[float, ...], ...]:
    """Return the tables of a plan for this rule as published: any expert that is read may be taken on."""
    return ((1.0,) * num_experts,) * num_layers


RULE = Rule(among_largest_or_read_anyway, keep_all=math.inf, skip_all=0.0, decode_only=True)
