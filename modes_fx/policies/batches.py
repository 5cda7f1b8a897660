"""Which experts a call reads, for rules that look at all of its tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def read_by(pairs_TK: Tensor, expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """Return bool [E + 1]: the experts of the pairs that are True, int64 [T, K]; what is behind the E is of no meaning."""
    # Every write is the same True, so that their order does not matter; what is not read is written behind the end.
    nowhere = torch.zeros(num_experts + 1, dtype=torch.bool, device=expert_ids_TK.device)
    return nowhere.scatter(0, torch.where(pairs_TK, expert_ids_TK, num_experts).reshape(-1), True)
