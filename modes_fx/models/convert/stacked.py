"""Experts that are stacked as in transformers, but whose forward loops over them: step3p7, and remote code alike.

    gate_up_proj [E, 2I, H], down_proj [E, H, I];  experts(hidden, ids, weights)

Nothing is copied or moved: the stand-in computes with the experts' own parameters and their own ``_apply_gate``.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from modes_fx.models.convert.dispatch import DispatchedExperts, grouped_linear
from modes_fx.models.convert.form import Form, StandIn, shallow_copy


class PlainExperts(DispatchedExperts):
    """Dispatch over another module's stacked weights.

    Args:
        source: The experts, which stay the weights' owner.
    """

    def __init__(self, source: Any) -> None:
        super().__init__(source.gate_up_proj.shape[0])
        self.source = source

    def body(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """See ``DispatchedExperts.body``."""
        gate_up = grouped_linear(rows, self.source.gate_up_proj, offsets)
        if hasattr(self.source, "_apply_gate"):
            inner = self.source._apply_gate(gate_up)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            inner = self.source.act_fn(gate) * up
        return grouped_linear(inner, self.source.down_proj, offsets)


def experts_in(block: nn.Module) -> str | None:
    """See ``Form.experts_in``."""
    experts = getattr(block, "experts", None)
    if experts is None or hasattr(experts, "has_gate") or not isinstance(experts, nn.Module):
        return None  # has_gate: served by transformers' interface
    gate_up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor) and gate_up.dim() == down.dim() == 3):
        return None
    num_experts, twice, hidden = gate_up.shape
    takes = len(inspect.signature(experts.forward).parameters)
    return "experts" if takes == 3 and tuple(down.shape) == (num_experts, hidden, twice // 2) else None


def convert(block: nn.Module) -> StandIn:
    """See ``Form.convert``."""
    experts = PlainExperts(block.experts)
    return StandIn(shallow_copy(block, experts=experts), experts)


FORM = Form(experts_in, convert)
