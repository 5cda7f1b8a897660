"""K by the entropy of the router: one expert for a token that it is sure of, all for one that it is not.

Source: the package ``adaptive-k-routing`` (PyPI, 0.1.5), which takes the smallest K of a ladder whose entropy threshold lies
above the token's; its defaults are 1 below 0.6 nats, 2 below 1.2, else 4. These thresholds are ``0.866 * ln(2 K)``, so one
bound in the place of the 0.866 moves them all, and gives the ladder a step for each power of two up to K. Adapted: the package
takes the entropy of the softmax over all experts; here it is that of the K weights dispatched, scaled to sum to 1, which are
there behind any router. Survivors take over the whole sum, as there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modes_fx.policies.ranks import ranks
from modes_fx.policies.rule import Rule
from modes_fx.policies.survivors import taking_over

_LADDER = tuple(2**power for power in range(8))


def fewer_where_sure(weights_TK: Tensor, bound_T: Tensor) -> tuple[Tensor, Tensor]:
    """Keep a token's k largest weights, for the smallest k of 1, 2, 4, ... that its entropy allows; else all K.

    ::

        H = -sum of q ln q,  q = w / sum of w                k  iff  H < bound * ln(2 k)

    Rank 1 stays under any finite bound, so that at most 1 - 1/K is skipped. No k but K is above 128.
    """
    bound_T1, rank_TK = bound_T.unsqueeze(1), ranks(weights_TK)
    octaves_TK = sum((rank_TK >= k).float() for k in _LADDER)  # log2 of 2 k, for the largest k at which this rank is dropped
    sure = _entropy(weights_TK) < bound_T1 * math.log(2) * octaves_TK
    keep = ~sure & (bound_T1 < math.inf) & (weights_TK > -math.inf)
    return keep, taking_over(keep, weights_TK)


def _entropy(weights_TK: Tensor) -> Tensor:
    """Return that of each token in nats, [T, 1]; 0 where all weights are 0."""
    mass_TK = weights_TK.clamp(min=0)
    share_TK = mass_TK / mass_TK.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    entropy: Tensor = torch.special.entr(share_TK).sum(dim=1, keepdim=True)
    return entropy


RULE = Rule(fewer_where_sure, keep_all=0.0, skip_all=math.inf)
