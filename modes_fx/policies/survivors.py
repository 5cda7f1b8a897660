"""What the pairs that a token keeps are weighted with, where a rule hands them what the dropped ones had."""

from __future__ import annotations

import torch
from torch import Tensor


def taking_over(keep_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Return the weights [T, K] with those of dropped pairs 0 and the others scaled to their token's whole sum.

    Weights below 0 count as 0 in both sums. Where all is kept the factor is 1, bit by bit.
    """
    mass_TK = weights_TK.clamp(min=0)
    kept_T1 = torch.where(keep_TK, mass_TK, 0.0).sum(dim=1, keepdim=True)
    factor_T1 = torch.where(kept_T1 > 0, mass_TK.sum(dim=1, keepdim=True) / kept_T1, 1.0)
    return torch.where(keep_TK, weights_TK, 0.0) * factor_T1
