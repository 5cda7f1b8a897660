"""Blocks whose forward routes by softmax and loops over a ModuleList of experts.

The sparse MoE blocks of Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE before transformers 5, and remote code made after them::

    logits = gate(x);  w, ids = topk(softmax(logits));  w /= sum(w) where norm_topk_prob says so
    for e in range(E): y.index_add_(experts[e](x[rows]) * w[rows])
    y + sigmoid(shared_expert_gate(x)) * shared_expert(x)     where there is one
    return y, logits

The loop sits in the middle of ``forward``, so the stand-in has another ``forward``. Blocks of the same structure that route in
another way (Phi-3.5-MoE) are found out by what they compute, before anything is optimised: see ``probe``.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from modes_fx.models.convert.form import Form, StandIn, shallow_copy
from modes_fx.models.convert.stack import StackedExperts


def experts_in(block: nn.Module) -> str | None:
    """See ``Form.experts_in``."""
    experts, gate = getattr(block, "experts", None), getattr(block, "gate", None)
    listed = isinstance(experts, nn.ModuleList) and isinstance(gate, nn.Linear) and gate.out_features == len(experts)
    return "experts" if listed and isinstance(getattr(block, "top_k", None), int) else None


def convert(block: nn.Module) -> StandIn:
    """See ``Form.convert``."""
    shallow_copy(block)  # raises before any weight moves
    experts = StackedExperts(block.experts)  # type: ignore[arg-type]
    twin = shallow_copy(block, experts=experts)
    vars(twin)["forward"] = types.MethodType(_forward, twin)
    return StandIn(twin, experts)


def _forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    hidden = hidden_states.view(-1, hidden_states.shape[-1])
    router_logits = self.gate(hidden)
    weights, ids = torch.topk(torch.softmax(router_logits, dim=1, dtype=torch.float), self.top_k, dim=-1)
    if getattr(self, "norm_topk_prob", True):  # Mixtral always does
        weights = weights / weights.sum(dim=-1, keepdim=True)
    result = self.experts(hidden, ids, weights.to(hidden.dtype))
    if getattr(self, "shared_expert", None) is not None:
        result = result + torch.sigmoid(self.shared_expert_gate(hidden)) * self.shared_expert(hidden)
    return result.view(hidden_states.shape), router_logits


FORM = Form(experts_in, convert)
