"""The tables that rules ask for."""

import torch
from torch import Tensor


def table_for(rule: str, experts: int) -> Tensor | None:
    """Return a table for one layer: a seed, or similarities or slacks in quarters (products with such numbers are exact)."""
    if rule == "random":
        return torch.tensor([77.0])
    if rule == "batch_threshold":
        return torch.tensor([0.5, 0.25, 1.0, 0.0, 0.75]).repeat(experts)[:experts]
    if rule == "diep":
        similar = torch.randint(1, 9, (experts, experts), generator=torch.Generator().manual_seed(0)) / 4
        return (similar + similar.T).fill_diagonal_(1.0)
    return None
