"""Blocks with a method ``moe_infer(hidden, ids, weights)`` that loops over a ModuleList of experts.

Published with the models' weights as remote code: DeepSeek-V2 and -V3, DeepSeek-VL2, Kimi-VL and their kin. The loop
fetches counts from the device (``.cpu().numpy()``), so it cannot be traced; the rest of the block can::

    ids, weights[, ...] = gate(x);  y = moe_infer(x, ids, weights);  y + shared_experts(x)

The stand-in is the block with that one method replaced. Older code hands over flat ids and weights: both do.
Refused on purpose: expert parallelism (``EXPERT_PARALLEL``).
"""

from __future__ import annotations

import inspect

from torch import nn

from modes_fx.models.convert.form import Form, StandIn, shallow_copy
from modes_fx.models.convert.stack import StackedExperts


def experts_in(block: nn.Module) -> str | None:
    """See ``Form.experts_in``."""
    infer = getattr(type(block), "moe_infer", None)
    takes = len(inspect.signature(infer).parameters) - 1 if callable(infer) else 0
    return "experts" if takes == 3 and isinstance(getattr(block, "experts", None), nn.ModuleList) else None


def convert(block: nn.Module) -> StandIn:
    """See ``Form.convert``."""
    shallow_copy(block)  # raises before any weight moves
    experts = StackedExperts(block.experts)  # type: ignore[arg-type]
    return StandIn(shallow_copy(block, moe_infer=experts), experts)


FORM = Form(experts_in, convert)
