"""vLLM's Triton experts on the kept pairs alone, by the map that it has for expert parallelism.

What ``TritonExperts.apply`` does with a map, on which this rests: pairs whose expert maps to -1 are left out at alignment
(``ignore_invalid_experts``), so that no block is launched for them; ``moe_sum`` leaves their rows out, which nobody wrote. So
the map gets one expert more, the one of dropped pairs, and it maps to -1. Shapes are fixed and nothing is read on the host:
CUDA graphs replay it with other tokens dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def extended_map(expert_map: Tensor | None, num_experts: int, device: torch.device) -> Tensor:
    """Return the map to local experts with an entry for dropped pairs, int32 [E + 1].

    Args:
        expert_map: int32 [E], that of expert parallelism, -1 for experts of other ranks; None without it.
        num_experts: E.
        device: Where the model is.
    """
    known = torch.arange(num_experts, dtype=torch.int32, device=device) if expert_map is None else expert_map
    return torch.cat([known, known.new_tensor([-1])])


def skipping_apply(experts: Any, num_experts: int, expert_map: Tensor) -> Callable[..., Any]:
    """Return what computes kept pairs in the place of ``TritonExperts.apply``; ``expert_map`` is an extended one."""
    inner = experts.apply

    def apply(**given: Any) -> Any:
        return inner(**{**given, "expert_map": expert_map, "global_num_experts": num_experts + 1})

    return apply
