"""Put markers on the routing sites of a graph whose model knows nothing of thresholds; ``skip_experts`` takes them from there.

IR level: dynamo's (torch IR), before AOT::

    dispatch(hidden_TH, ids, weights)  ->  dispatch(hidden_TH, ids, marker(weights, ids, classes_T, bounds, ...))
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from modes_fx.passes.emit import Emitter
from modes_fx.passes.site import Reject, RoutingSite, SiteRecord
from modes_fx.passes.skip_experts import Dispatch, matched

Given = tuple[fx.Node, fx.Node, fx.Node | None]


def mark_sites(
    graph: fx.Graph, given: Callable[[RoutingSite], Given], rule_key: str, dispatch: Dispatch
) -> tuple[SiteRecord, ...]:
    """Mark every routing site of a dynamo graph, in place.

    Args:
        graph: The graph.
        given: Puts what a site's marker takes into the graph, in front of the site: classes, bounds, and the rule's table if it
            has one.
        rule_key: Names the keep-rule.
        dispatch: See ``skip_experts``.

    Returns:
        One record for each candidate that is no site, with the reason.
    """
    sites, refused = matched(graph)
    for site in sites:
        _mark(graph, site, given(site), rule_key, dispatch)
    graph.lint()
    return tuple(_rejection(anchor.name, form, reason) for anchor, form, reason in refused)


def _mark(graph: fx.Graph, site: RoutingSite, given: Given, rule_key: str, dispatch: Dispatch) -> None:
    node = {item.name: item for item in graph.nodes}
    ids, weights, hidden = node[site.expert_ids_S], node[site.weights_S], node[site.hidden_TH]
    users = list(weights.users)
    classes, bounds, table = given
    nodes = [weights, ids, classes, bounds, *([table] if table is not None else [])]
    (marked,) = Emitter.after(hidden, *nodes).trace(_marked, *nodes, top_k=site.top_k, rule=rule_key, dispatch=dispatch)
    for user in users:
        user.replace_input_with(weights, marked)


def _marked(
    weights_S: Tensor,
    ids_S: Tensor,
    classes: Tensor,
    bounds: Tensor,
    table: Tensor | None = None,
    *,
    top_k: int,
    rule: str,
    dispatch: str,
) -> Tensor:
    weights_TK, ids_TK = weights_S.reshape(-1, top_k), ids_S.reshape(-1, top_k)
    marked: Tensor = torch.ops.modes_fx.keep.default(weights_TK, ids_TK, classes, bounds, table, rule, dispatch, -1)[0]
    return marked.reshape(-1)


def _rejection(anchor: str, form: str, reason: Reject) -> SiteRecord:
    return SiteRecord(anchor, "", "rejected", reason.code, reason.detail, form)
