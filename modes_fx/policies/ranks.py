"""Where each of a token's experts stands among its K, without sorting: K is small, and comparisons fuse."""

from __future__ import annotations

import torch
from torch import Tensor


def at_or_after(weights_TK: Tensor) -> Tensor:
    """Return bool [T, i, j]: pair j ranks with or behind pair i, by descending weight. Ties rank in the router's order."""
    own, other = weights_TK.unsqueeze(2), weights_TK.unsqueeze(1)
    return (other < own) | (other == own).triu()


def ranks(weights_TK: Tensor) -> Tensor:
    """Return float32 [T, K]: 0 for a token's largest weight, K - 1 for its smallest."""
    return weights_TK.shape[1] - at_or_after(weights_TK).sum(dim=2, dtype=torch.float32)


def tail_sums(weights_TK: Tensor) -> Tensor:
    """Return, for each pair, the sum of its own and all smaller weights of its token, [T, K]; weights below 0 count as 0."""
    terms = weights_TK.clamp(min=0).unsqueeze(1)
    return torch.where(at_or_after(weights_TK), terms, 0.0).sum(dim=2)


def sums_before(weights_TK: Tensor) -> Tensor:
    """Return, for each pair, the sum of all larger weights of its token, [T, K]; weights below 0 count as 0."""
    terms = weights_TK.clamp(min=0).unsqueeze(1)
    return torch.where(at_or_after(weights_TK), 0.0, terms).sum(dim=2)
