"""DBRX: the experts' weights lie one after another in flat matrices, and gate and up are apart.

    w1, v1, w2 [E * I, H];  down = act(x @ w1[e].T) * (x @ v1[e].T) @ w2[e]

Seen as [E, I, H] without a copy; three grouped GEMMs in place of two.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from modes_fx.models.convert.dispatch import DispatchedExperts, grouped_linear
from modes_fx.models.convert.form import Form, StandIn, shallow_copy


class FlatExperts(DispatchedExperts):
    """Dispatch over views of the flat matrices.

    Args:
        source: The block's experts, which stay the weights' owner.
    """

    def __init__(self, source: Any) -> None:
        super().__init__(source.num_experts)
        self.mlp = source.mlp

    def body(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """See ``DispatchedExperts.body``."""
        mlp: Any = self.mlp
        w1, v1, w2 = (flat.view(self.num_experts, -1, flat.shape[-1]) for flat in (mlp.w1, mlp.v1, mlp.w2))
        inner = mlp.activation_fn(grouped_linear(rows, w1, offsets)) * grouped_linear(rows, v1, offsets)
        return grouped_linear(inner, w2, offsets, transposed=True)


def experts_in(block: nn.Module) -> str | None:
    """See ``Form.experts_in``."""
    experts = getattr(block, "experts", None)
    flat = [getattr(getattr(experts, "mlp", None), name, None) for name in ("w1", "v1", "w2")]
    found = all(isinstance(weight, Tensor) and weight.dim() == 2 for weight in flat)
    return "experts" if found and hasattr(experts, "num_experts") else None


def convert(block: nn.Module) -> StandIn:
    """See ``Form.convert``."""
    experts = FlatExperts(block.experts)
    return StandIn(shallow_copy(block, experts=experts), experts)


FORM = Form(experts_in, convert)
