"""What the experts of an optimised model run, wherever they are called from: the marker, then the stock dispatch.

transformers calls ``experts_forward`` under the name ``modes_fx``, converted blocks call ``run_dispatch``. Inside any trace
the two stand in the graph as they are. Called from Python, they are compiled together (``regions``): once for all layers, since
a layer's weights, thresholds and token classes are inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from modes_fx.graph import marker
from modes_fx.graph.running import traced
from modes_fx.policies import rerouted

if TYPE_CHECKING:
    from modes_fx.graph.runtime import Runtime

IMPLEMENTATION = "modes_fx"
_ATTRIBUTE = "_modes_fx_site"

Given = tuple[Tensor, Tensor, Tensor | None]
"""What a layer's marker takes: classes int64 [T], bounds float32 [classes], and the rule's table if it has one."""

Kept = tuple[Tensor, Tensor]
"""What a dispatch computed: bool [T, K], the pairs, and int64 [T, K], their experts."""

Dispatch = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


class Site:
    """What the experts of one layer know of the optimised model that they belong to.

    Args:
        runtime: The model's.
        layer: The layer's index.
        alone: Runs the experts when they are called from Python: ``alone(experts, hidden_TH, ids_TK, weights_TK)``.
    """

    def __init__(self, runtime: Runtime, layer: int, alone: Dispatch) -> None:
        self.runtime = runtime
        self.layer = layer
        self.alone = alone

    def __reduce__(self) -> Any:
        return left_in_a_copy, ()  # a copied or pickled model is not optimised


class _OneLayer:
    """What a graph that serves all layers is given, while it is traced; only dynamo ever sees it set."""

    def __init__(self) -> None:
        self.given: Given | None = None
        self.kept: Kept | None = None


_one_layer = _OneLayer()


def left_in_a_copy() -> None:
    """Stand in for what optimises a model in copies and pickles; unpickling registers the implementation's name."""


def attach(experts: nn.Module, site: Site | None) -> Site | None:
    """Let experts know their site, or no longer; return what they knew before."""
    before: Site | None = vars(experts).pop(_ATTRIBUTE, None)
    if site is not None:
        vars(experts)[_ATTRIBUTE] = site
    return before


def experts_forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run the experts of an optimised model; transformers calls this under the name ``modes_fx``.

    Args:
        experts: The experts module.
        hidden_states: [T, H].
        top_k_index: int64 [T, K].
        top_k_weights: [T, K].
    """
    return run_dispatch(experts, dispatch_of(experts), hidden_states, top_k_index, top_k_weights)


def run_dispatch(experts: Any, dispatch: Dispatch, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Run a dispatch that marks its weights: in line where a trace takes it in, else compiled on its own."""
    site = site_of(experts)
    if site is None or site.runtime.suspended or traced():
        return dispatch(experts, hidden_TH, ids_TK, weights_TK)
    return site.alone(experts, hidden_TH, ids_TK, weights_TK)


def marked_dispatch(experts: nn.Module, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Run transformers' ``grouped_mm`` on marked weights."""
    ids_TK, weights_TK = marked(experts, ids_TK, weights_TK)
    result: Tensor = grouped_mm_experts_forward(experts, hidden_TH, ids_TK, weights_TK)
    return result


def held_dispatch(experts: nn.Module, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Run transformers' ``grouped_mm`` on the experts that this process holds; see ``attach.expert_parallel``.

    A pair whose expert is elsewhere, or that was dropped, has an id that no expert here has. The marker says so, and behind it
    the dispatch can be that of experts that are all here.
    """
    site = site_of(experts)
    if site is None or site.runtime.suspended:
        stock: Tensor = grouped_mm_experts_forward(experts, hidden_TH, ids_TK, weights_TK)
        return stock
    held: Any = _Held(experts)
    weights_TK = torch.where(ids_TK < held.num_experts, weights_TK, -math.inf)  # which no rule keeps
    classes, bounds = ids_TK.new_zeros(len(ids_TK)), torch.full((1,), _ANY, device=weights_TK.device)
    layer = site.layer if _one_layer.given is None else -1
    weights_TK, keep_TK = marker.keep(weights_TK, ids_TK, classes, bounds, None, "threshold", site.runtime.dispatch, layer)
    if _one_layer.given is not None:
        _one_layer.kept = keep_TK, ids_TK
    result: Tensor = grouped_mm_experts_forward(held, hidden_TH, ids_TK.clamp(max=held.num_experts - 1), weights_TK)
    return result


_ANY = torch.finfo(torch.float32).min


class _Held:
    """Experts that are some of a layer's, as if there were no others."""

    _is_expert_parallel = False

    def __init__(self, experts: nn.Module) -> None:
        self._experts = experts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)


def dispatch_of(experts: Any) -> Dispatch:
    """Return the marked dispatch that an experts module runs: transformers', or a converted block's own."""
    if hasattr(type(experts), "dispatch"):
        own: Dispatch = type(experts).dispatch
        return own
    return held_dispatch if is_expert_parallel(experts) else marked_dispatch


def is_expert_parallel(experts: nn.Module) -> bool:
    """Return whether other processes hold some of a layer's experts, as transformers marks it."""
    return bool(getattr(experts, "_is_expert_parallel", False))


def marked(experts: nn.Module, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the experts of all pairs, which the rule may re-route, and their weights, through the marker: 0 where dropped.

    Both are as they were for experts without a site.
    """
    site = site_of(experts)
    if site is None or site.runtime.suspended:
        return ids_TK, weights_TK
    runtime = site.runtime
    if _one_layer.given is not None:
        layer, (classes, bounds, table) = -1, _one_layer.given
    else:
        layer = site.layer
        classes, bounds, table = runtime.given(layer, weights_TK.shape[0], weights_TK.device)
    ids_TK = rerouted(runtime.rule, ids_TK, weights_TK, classes, bounds, table)
    weights_TK, keep_TK = marker.keep(weights_TK, ids_TK, classes, bounds, table, runtime.rule_key, runtime.dispatch, layer)
    if _one_layer.given is not None:
        _one_layer.kept = keep_TK, ids_TK
    elif (forward := runtime.running()) is not None:
        forward.note(layer, classes, keep_TK, ids_TK)
    return ids_TK, weights_TK


def is_marked(experts: nn.Module) -> bool:
    """Return whether ``marked`` puts the marker on the weights of these experts."""
    site = site_of(experts)
    return site is not None and not site.runtime.suspended


def site_of(experts: nn.Module) -> Site | None:
    """Return what experts know of the optimised model that they belong to; None where they belong to none."""
    site: Site | None = getattr(experts, _ATTRIBUTE, None)
    return site


def of_one_layer(
    call: Callable[..., Any], given: Given, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Kept | None]:
    """Call what holds one dispatch, in a trace, with what its marker takes; return the result and which pairs were kept."""
    _one_layer.given, _one_layer.kept = given, None
    try:
        output = call(*args, **kwargs)
        return output, _one_layer.kept
    finally:
        _one_layer.given, _one_layer.kept = None, None


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
