"""The experts implementation that an optimised model names: what its experts run, wherever they are called from.

Dynamo inlines the modules of what it traces and passes by the compiled calls that regions have. So a ``torch.compile`` around
the whole model, or hooks that keep a block from being traced, would leave the regions aside and skip nothing, silently.
They all reach the experts, though: inside a region's own trace these are the stock dispatch, which the pass rewrites, and
anywhere else they run as a region of their own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

IMPLEMENTATION = "modes_fx"

ExpertsCall = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class _RegionTrace:
    active = False


_region_trace = _RegionTrace()
_alone: weakref.WeakKeyDictionary[nn.Module, ExpertsCall] = weakref.WeakKeyDictionary()


def call_as_region(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module whose trace the pass will see; only dynamo runs this, which undoes the mark before any graph runs."""
    _region_trace.active = True
    try:
        return module._call_impl(*args, **kwargs)
    finally:
        _region_trace.active = False


def left_in_a_copy() -> None:
    """Stand in for the state of an optimised model in copies and pickles; unpickling it registers the implementation's name."""


def run_alone(experts: nn.Module, call: ExpertsCall | None) -> None:
    """Let an experts module run ``call`` when no region around it is traced; None: the stock dispatch."""
    if call is None:
        _alone.pop(experts, None)
    else:
        _alone[experts] = call


def stock_dispatch(experts: nn.Module, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Run transformers' ``grouped_mm``, the form that the pass rewrites."""
    result: Tensor = grouped_mm_experts_forward(experts, hidden_TH, ids_TK, weights_TK)
    return result


def experts_forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run the experts of an optimised model; transformers calls this under the name ``modes_fx``.

    Args:
        experts: The experts module.
        hidden_states: [T, H].
        top_k_index: int64 [T, K].
        top_k_weights: [T, K].
    """
    if _region_trace.active:
        return stock_dispatch(experts, hidden_states, top_k_index, top_k_weights)
    alone: Tensor = _run_alone(experts, hidden_states, top_k_index, top_k_weights)
    return alone


@torch._dynamo.disable(reason="the experts of a model that modes_fx optimised are compiled on their own")  # type: ignore[untyped-decorator]
def _run_alone(experts: nn.Module, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    return _alone.get(experts, stock_dispatch)(experts, hidden_TH, ids_TK, weights_TK)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
