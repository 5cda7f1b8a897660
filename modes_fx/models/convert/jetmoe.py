"""JetMoe: two linear layers over stacked weights, each split by the number of rows an expert has (a list on the host).

    input_linear.weight [E, 2I, H], output_linear.weight [E, H, I];  w = softmax(topk(router.layer(x)));  sum + bias

Nothing is copied or moved. Its attention has experts too, which are no MoE block and stay as they are.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from modes_fx.models.convert.dispatch import DispatchedExperts, grouped_linear
from modes_fx.models.convert.form import Form, StandIn, shallow_copy


class TwoLinears(DispatchedExperts):
    """Dispatch over the weights of the block's two linear layers.

    Args:
        block: The block, whose layers stay the weights' owners.
    """

    def __init__(self, block: Any) -> None:
        super().__init__(block.input_linear.num_experts)
        self.input_linear, self.output_linear = block.input_linear, block.output_linear
        self.activation = block.activation

    def body(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """See ``DispatchedExperts.body``."""
        gate, up = grouped_linear(rows, self.input_linear.weight, offsets).chunk(2, dim=-1)
        return grouped_linear(self.activation(gate) * up, self.output_linear.weight, offsets)


def experts_in(block: nn.Module) -> str | None:
    """See ``Form.experts_in``."""
    linears = [getattr(block, name, None) for name in ("input_linear", "output_linear")]
    stacked = all(isinstance(weight := getattr(item, "weight", None), Tensor) and weight.dim() == 3 for item in linears)
    routes = isinstance(getattr(getattr(block, "router", None), "layer", None), nn.Linear)
    return "input_linear" if stacked and routes and hasattr(block, "activation") else None


def convert(block: nn.Module) -> StandIn:
    """See ``Form.convert``."""
    experts = TwoLinears(block)
    twin = shallow_copy(block, experts=experts)
    vars(twin)["forward"] = types.MethodType(_forward, twin)
    return StandIn(twin, experts)


def _forward(self: Any, layer_input: Tensor) -> Tensor:
    hidden = layer_input.reshape(-1, layer_input.shape[-1])
    logits, ids = self.router.layer(hidden).float().topk(self.router.top_k, dim=1)
    weights = torch.softmax(logits, dim=1).type_as(hidden)
    result: Tensor = self.experts(hidden, ids, weights).view(layer_input.shape) + self.bias
    return result


FORM = Form(experts_in, convert)
