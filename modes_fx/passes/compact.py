"""Compact dispatch: gather, compute and add back only the kept pairs.

For a ``RoutingSite``, with N <= S = T * K kept pairs::

    keep_TK = rule(weights_TK, bound[token_class])
    kept_N  = nonzero(keep_TK)                         data-dependent length, no host sync on a CPU
    ids_N, order = sort(expert_ids[kept_N]);  kept_N = kept_N[order]         only where the site's rows are sorted
    ... the site's own body, on rows ids_N, weights[kept_N] and hidden[kept_N // K] ...
    out = zeros[T, H] (float32) .scatter_add(0, kept_N // K, weighted_NH)

A token, and a whole call, may keep nothing: every step works on 0 rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from modes_fx.passes.emit import Emitter, erase_dead, refresh_dependents
from modes_fx.passes.site import Reject, RoutingSite
from modes_fx.policies import KeepRule, decide


def rewrite(graph: fx.Graph, site: RoutingSite, rule: KeepRule, token_class: fx.Node, *bounds: fx.Node) -> fx.Node:
    """Rewrite the site in ``graph``; the arguments are those of ``static.rewrite``.

    Returns:
        The pair (token * K + rank) of each row that the experts compute, int64 [N].

    Raises:
        Reject: ``BODY_HAS_FIXED_ROWS`` when the work between the GEMMs names the number of pairs.
    """
    node = {item.name: item for item in graph.nodes}
    ids, weights, hidden = node[site.expert_ids_S], node[site.weights_S], node[site.hidden_TH]
    stock = [node[site.row_ids], node[site.row_weights], node[site.row_hidden]]
    users = [list(item.users) for item in stock]  # as they are now: the selection will use some of them too
    pairs, pair_token, *rows = Emitter.after(ids, weights, hidden).trace(
        _select, ids, weights, hidden, token_class, *bounds, rule=rule, top_k=site.top_k, sort=site.perm is not None
    )
    for old, new, using in zip(stock, rows, users, strict=True):
        for user in using:
            user.replace_input_with(old, new)
    combined, weighted = node[site.combined], node[site.weighted]
    try:
        refresh_dependents(*rows, until=weighted)
    except (RuntimeError, ValueError, TypeError) as error:
        raise Reject("BODY_HAS_FIXED_ROWS", f"the work between the GEMMs needs all S rows: {error}") from error
    (summed,) = Emitter(before=combined).trace(
        add_rows, weighted, pair_token, hidden, dtype=combined.meta["example_value"].dtype
    )
    combined.replace_all_uses_with(summed)
    erase_dead([node[name] for name in site.scaffold])
    return pairs


def _select(
    expert_ids: Tensor,
    weights: Tensor,
    hidden: Tensor,
    token_class: Tensor,
    *bounds: Tensor,
    rule: KeepRule,
    top_k: int,
    sort: bool,
) -> tuple[Tensor, ...]:
    keep, new_weights = decide(rule, expert_ids, weights, token_class, *bounds, top_k=top_k)
    weights = weights if new_weights is None else new_weights
    kept = keep.reshape(-1).nonzero().squeeze(1)
    ids = expert_ids[kept]
    if sort:
        ordered = torch.sort(ids)
        ids, kept = ordered[0], kept[ordered[1]]
    pair_token = kept // top_k
    return kept, pair_token, ids, weights[kept], hidden[pair_token]


def add_rows(weighted: Tensor, pair_token: Tensor, hidden: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Add up the rows [N, H] of each token (int64 [N]), in ``dtype`` [T, H]."""
    # float32 whatever the model's dtype: the stock sum over a token's experts accumulates in higher precision too.
    total = torch.zeros_like(hidden, dtype=torch.float32)
    # NOTE [why not index_add] Inductor generates atomic additions for it, which are slow. For an index that is expanded over
    # the columns, scatter_add sorts by row and needs none.
    return total.scatter_add(0, pair_token.unsqueeze(1).expand_as(weighted), weighted.float()).to(dtype)
