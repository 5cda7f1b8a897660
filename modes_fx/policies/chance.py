"""The floor: drop pairs at random, whatever their weights."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from modes_fx.policies.rule import Rule

_32_BITS = 0xFFFFFFFF


def by_chance(weights_TK: Tensor, bound_T: Tensor, expert_ids_TK: Tensor, table_1: Tensor) -> Tensor:
    """Drop a pair with the probability ``bound``.

    The draw is a hash of the token's place in the call, the expert and the layer's seed (the table, an integer below 2**24):
    the same on every device and in every run, and nothing is synchronised.
    """
    place_T1 = torch.arange(weights_TK.shape[0], device=weights_TK.device).unsqueeze(1)
    mixed = (place_T1 * 73856093) ^ (expert_ids_TK * 19349663) ^ (table_1.to(torch.int64) * 83492791)
    mixed = mixed & _32_BITS
    for factor in (0x45D9F3B, 0x119DE1F3, 0x2C1B3C6D):  # below 2**31, so that no product leaves 63 bits
        mixed = ((mixed ^ (mixed >> 16)) * factor) & _32_BITS
    draw_TK = (mixed >> 8).to(torch.float32) * 2.0**-24  # in [0, 1), exact
    return (draw_TK >= bound_T.unsqueeze(1)) & (weights_TK > -math.inf)


def seed_tables(num_layers: int, seed: int = 0) -> tuple[tuple[float, ...], ...]:
    """Return the tables of a plan for this rule: a seed for each layer."""
    draw = random.Random(seed)
    return tuple((float(draw.randrange(2**24)),) for _ in range(num_layers))


RULE = Rule(by_chance, keep_all=0.0, skip_all=math.inf)
