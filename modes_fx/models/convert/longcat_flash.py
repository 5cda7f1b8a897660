"""LongCat-Flash: some experts are the identity, so that a token may spend less.

    ids below E: gated MLPs, gate_up_proj [E or more, 2I, H], down_proj [E, H, I];  from E on: the token's own hidden state

Identity experts go through no GEMM: they add (sum of their weights) * hidden. Their pairs reach the dispatch as expert 0 with
a weight of minus infinity, which no keep-rule keeps, so they are never computed; statistics count them as skipped.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from modes_fx.graph.experts import is_marked
from modes_fx.models.convert.dispatch import DispatchedExperts, grouped_linear
from modes_fx.models.convert.form import Form, StandIn, shallow_copy


class ExpertsOrIdentity(DispatchedExperts):
    """Dispatch of the pairs that have an expert, and the identity for the others.

    Args:
        source: The block's experts, which stay the weights' owner.
    """

    def __init__(self, source: Any) -> None:
        super().__init__(source.num_routed_experts)
        self.source = source

    def dispatch(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """See ``DispatchedExperts.dispatch``; ids may lie beyond E."""
        routed = ids_TK < self.num_experts
        nothing = -math.inf if is_marked(self) else 0.0  # without a marker, nothing is skipped: 0 silences expert 0
        mine = super().dispatch(hidden_TH, torch.where(routed, ids_TK, 0), torch.where(routed, weights_TK, nothing))
        identity = torch.where(routed, 0.0, weights_TK).sum(dim=-1, keepdim=True)
        return mine + (hidden_TH * identity).to(hidden_TH.dtype)

    def body(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """See ``DispatchedExperts.body``."""
        source: Any = self.source
        gate, up = grouped_linear(rows, source.gate_up_proj[: self.num_experts], offsets).chunk(2, dim=-1)
        return grouped_linear(source.act_fn(gate) * up, source.down_proj, offsets)


def experts_in(block: nn.Module) -> str | None:
    """See ``Form.experts_in``."""
    experts = getattr(block, "experts", None)
    named = all(hasattr(experts, name) for name in ("num_routed_experts", "zero_expert_num", "identity_expert"))
    stacked = all(isinstance(getattr(experts, name, None), Tensor) for name in ("gate_up_proj", "down_proj"))
    return "experts" if named and stacked else None


def convert(block: nn.Module) -> StandIn:
    """See ``Form.convert``."""
    experts = ExpertsOrIdentity(block.experts)
    return StandIn(shallow_copy(block, experts=experts), experts)


FORM = Form(experts_in, convert)
