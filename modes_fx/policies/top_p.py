"""Top-p: as many experts as it takes to gather the weight p, few for a token that one expert is enough for.

Source: "Harder Tasks Need More Experts", arXiv 2403.07652, where a model is trained with it and p is a share of the softmax
over all experts. Adapted: without training, and within the K experts that the router chose, by the weights as dispatched.
Where a router does not renormalise these, they are the softmax's own, and the rule is the paper's, cut off at K. Where it does,
p is a share of the K, and the rule is NAEE's (``naee``) at ``beta = 1 - p`` with one beta for all layers. As in the paper,
survivors keep their weights.
"""

from __future__ import annotations

import math

from torch import Tensor

from modes_fx.policies.ranks import sums_before
from modes_fx.policies.rule import Rule


def until_sum_reaches(weights_TK: Tensor, bound_T: Tensor) -> Tensor:
    """Keep a token's largest weights, as few as sum to at least ``bound``; all, if they never do.

    ::

        keep rank i  iff  w_1 + ... + w_(i-1) < bound

    Any bound above 0 keeps rank 1, so that at most 1 - 1/K is skipped.
    """
    return (sums_before(weights_TK) < bound_T.unsqueeze(1)) & (weights_TK > -math.inf)


RULE = Rule(until_sum_reaches, keep_all=math.inf, skip_all=0.0)
