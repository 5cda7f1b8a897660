"""The tables that rules ask for, and bounds that skip more and more."""

import math

import torch
from torch import Tensor


def table_for(rule: str, experts: int) -> Tensor | None:
    """Return a table for one layer: a seed, or similarities or slacks in quarters (products with such numbers are exact)."""
    if rule == "random":
        return torch.tensor([77.0])
    if rule == "batch_threshold":
        return torch.tensor([0.5, 0.25, 1.0, 0.0, 0.75]).repeat(experts)[:experts]
    if rule == "oea":
        return torch.tensor([1.0, 1.0, 0.0]).repeat(experts)[:experts]
    if rule in ("diep", "sere"):
        similar = torch.randint(1, 9, (experts, experts), generator=torch.Generator().manual_seed(0)) / 4
        return (similar + similar.T).fill_diagonal_(1.0)
    return None


def bound_for(rule: str, share: float) -> float:
    """Return a bound that skips more the larger the share: 0 keeps all, 1e9 as much as goes."""
    if rule == "batch_threshold":
        return share / 2  # which is about a weight, not the sum of a token's
    if rule == "top_p":
        return max(1 - share, 1e-9) if share else math.inf
    if rule == "entropy_k":
        return 2 * share
    if rule == "oea":
        return 0.0 if share > 1 else math.ceil(2 * (1 - share)) if share else math.inf
    return share
