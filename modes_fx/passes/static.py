"""Static dispatch: dropped pairs get the id E, sort last and fall outside the GEMMs' offsets.

For a ``RoutingSite``::

    ids = where(rule(weights_TK, bound[token_class]), expert_ids, E)
    ... the site's own sort, histogram (which counts ids below E only), body and un-permute ...
    weighted = where(ids_g < E, weighted, 0)

Shapes never depend on data: no host sync, and CUDA graphs can capture it. Rows past the last offset are *uninitialised*
memory in ``torch._grouped_mm``'s output, so they are selected away, never multiplied by 0 (0 * NaN is NaN).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from modes_fx.passes.emit import Emitter
from modes_fx.passes.site import RoutingSite
from modes_fx.policy import KeepRule


def rewrite(
    graph: fx.Graph, site: RoutingSite, rule: KeepRule, token_class: fx.Node, bounds: fx.Node
) -> tuple[fx.Node, fx.Node]:
    """Rewrite the site in ``graph``; arguments and result as in ``compact.rewrite``."""
    node = {item.name: item for item in graph.nodes}
    sorted_ids, weighted = node[site.sorted_ids], node[site.weighted]
    sort = sorted_ids.args[0]
    (marked,) = Emitter(before=sort).trace(
        _mark,
        node[site.expert_ids_S],
        node[site.weights_S],
        token_class,
        bounds,
        rule=rule,
        top_k=site.top_k,
        sentinel=site.num_experts,
    )
    sort.replace_input_with(node[site.expert_ids_S], marked)

    in_body = [user for user in sorted_ids.users if user.name in site.body]  # gathers of biases, by expert
    if in_body:
        (clamped,) = Emitter(before=in_body[0]).trace(_clamp, sorted_ids, largest=site.num_experts - 1)
        for user in in_body:
            user.replace_input_with(sorted_ids, clamped)

    (selected,) = Emitter(before=weighted.next).trace(_select_kept, weighted, sorted_ids, sentinel=site.num_experts)
    weighted.replace_all_uses_with(selected, delete_user_cb=lambda user: user is node[site.restored])
    return node[site.perm], node[site.offsets]


def _mark(
    expert_ids: Tensor,
    weights: Tensor,
    token_class: Tensor,
    bounds: Tensor,
    *,
    rule: KeepRule,
    top_k: int,
    sentinel: int,
) -> Tensor:
    keep = rule(weights.reshape(-1, top_k).float(), bounds[token_class])
    return torch.where(keep.reshape(-1), expert_ids, sentinel)


def _clamp(sorted_ids: Tensor, *, largest: int) -> Tensor:
    return sorted_ids.clamp(max=largest)


def _select_kept(weighted: Tensor, sorted_ids: Tensor, *, sentinel: int) -> Tensor:
    return torch.where((sorted_ids < sentinel).unsqueeze(1), weighted, 0.0)
