"""Llama 4: the routing weight multiplies the expert's *input*, and every expert runs on every token.

    s_TE = sigmoid(logits), 0 where not chosen;  y = sum_e expert_e(s_Te * x);  out = shared_expert(x) + y

The experts have no bias and their gate times up is 0 at 0, so those that were not chosen add nothing, and with one expert a
token (K = 1, as published) there is one term: ``expert(s * x)``. The dispatch multiplies that by s; it is divided by s again.
Refused on purpose: K > 1 (``WEIGHTS_ON_INPUT``), where a token's inputs differ from expert to expert.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn

from modes_fx.models.convert.dispatch import DispatchedExperts, grouped_linear
from modes_fx.models.convert.form import Form, StandIn, shallow_copy
from modes_fx.passes.site import Reject


class WeightedInputs(DispatchedExperts):
    """Dispatch of scaled rows, one expert a token.

    Args:
        source: The block's experts, which stay the weights' owner.
    """

    is_transposed = True

    def __init__(self, source: Any) -> None:
        super().__init__(source.gate_up_proj.shape[0])
        self.source = source

    def dispatch(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """See ``DispatchedExperts.dispatch``; K is 1."""
        scaled = super().dispatch(hidden_TH * weights_TK, ids_TK, weights_TK.float())
        return torch.where(weights_TK > 0, scaled / weights_TK, 0.0)

    def body(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """See ``DispatchedExperts.body``."""
        source: Any = self.source
        gate, up = grouped_linear(rows, source.gate_up_proj, offsets, transposed=True).chunk(2, dim=-1)
        return grouped_linear(up * source.act_fn(gate), source.down_proj, offsets, transposed=True)


def experts_in(block: nn.Module) -> str | None:
    """See ``Form.experts_in``."""
    experts = getattr(block, "experts", None)
    gate_up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor) and gate_up.dim() == down.dim() == 3):
        return None
    transposed = tuple(down.shape) == (gate_up.shape[0], gate_up.shape[2] // 2, gate_up.shape[1])
    takes = len(inspect.signature(experts.forward).parameters) if isinstance(experts, nn.Module) else 0
    return "experts" if transposed and takes == 1 and not hasattr(experts, "has_gate") else None


def convert(block: nn.Module) -> StandIn:
    """See ``Form.convert``."""
    if block.top_k != 1:
        raise Reject("WEIGHTS_ON_INPUT", f"the routing weights multiply the input of {block.top_k} experts a token")
    experts = WeightedInputs(block.experts)
    twin = shallow_copy(block, experts=experts)
    vars(twin)["forward"] = types.MethodType(_forward, twin)
    return StandIn(twin, experts)


def _forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
    scores, router_logits = self.router(hidden)
    weights, ids = scores.max(dim=1, keepdim=True)
    return self.shared_expert(hidden) + self.experts(hidden, ids, weights), router_logits


FORM = Form(experts_in, convert)
