"""Compact dispatch: gather, compute and add back only the kept pairs.

For a ``RoutingSite``, with N <= S = T * K kept pairs::

    kept_N  = nonzero(keep_TK)                         data-dependent length, no host sync on a CPU
    ids_N, order = sort(expert_ids[kept_N]);  kept_N = kept_N[order]         only where the site's rows are sorted
    ... the site's own body, on rows ids_N, weights[kept_N] and hidden[kept_N // K] ...
    out = zeros[T, H] (float32) .scatter_add(0, kept_N // K, weighted_NH)

A token, and a whole call, may keep nothing: every step works on 0 rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from modes_fx.passes.emit import Emitter, erase_dead, erase_unused
from modes_fx.passes.site import Reject, RoutingSite
from modes_fx.passes.values import complete, fake_mode_of, forget, set_value, under_fake, value_of


def rewrite(graph: fx.Graph, site: RoutingSite, keep: fx.Node) -> None:
    """Rewrite the site in ``graph``; the arguments are those of ``static.rewrite``.

    Raises:
        Reject: ``BODY_HAS_FIXED_ROWS`` when the work between the GEMMs names the number of pairs. The site is as it was.
    """
    node = {item.name: item for item in graph.nodes}
    ids, weights, hidden = node[site.expert_ids_S], node[site.weights_S], node[site.hidden_TH]
    stock = [node[site.row_ids], node[site.row_weights], node[site.row_hidden]]
    users = [site.readers(item) for item in stock]  # as they are now: the selection will use some of them too
    kept, pair_token, *rows = Emitter.after(ids, weights, hidden, keep).trace(
        _select, ids, weights, hidden, keep, top_k=site.top_k, sort=site.perm is not None
    )
    replace_rows(stock, rows, users, kept, until=node[site.weighted])
    combined, weighted = node[site.combined], node[site.weighted]
    (summed,) = Emitter(before=combined).trace(add_rows, weighted, pair_token, hidden, dtype=value_of(combined).dtype)
    combined.replace_all_uses_with(summed)
    erase_dead([node[name] for name in site.scaffold])


def replace_rows(
    stock: Sequence[fx.Node], rows: Sequence[fx.Node], users: Sequence[Sequence[fx.Node]], pairs: fx.Node, *, until: fx.Node
) -> None:
    """Let the work between the GEMMs take other rows.

    Args:
        stock: What it takes.
        rows: What it is to take, one for each; made for that, by gathering from what the stock ones are gathered from.
        users: The nodes of that work that take each.
        pairs: int64 [N], the pair of each row.
        until: Its end.

    Raises:
        Reject: ``BODY_HAS_FIXED_ROWS`` when it names the number of rows. It is as it was, and the rows are gone.
    """
    _swap(stock, rows, users)
    number = value_of(pairs).shape[0]
    with under_fake(fake_mode_of(until.graph)):
        for row, like in zip(rows, map(value_of, stock), strict=True):  # quicker than to gather them from fake tensors
            set_value(row, torch.empty((number, *like.shape[1:]), dtype=like.dtype, device=like.device))
    changed = _behind(rows, until)
    for node in changed:
        forget(node)
    try:
        complete(changed)
    except (RuntimeError, ValueError, TypeError) as error:
        _swap(rows, stock, users)
        for node in changed:
            forget(node)
        erase_unused(rows)
        raise Reject("BODY_HAS_FIXED_ROWS", f"the work between the GEMMs needs all S rows: {error}") from error


def _behind(sources: Sequence[fx.Node], until: fx.Node) -> list[fx.Node]:
    """Return what depends on some nodes, in graph order, up to and with ``until``."""
    behind: dict[fx.Node, None] = {}
    for node in until.graph.nodes:
        if any(source in behind or source in sources for source in node.all_input_nodes):
            behind[node] = None
        if node is until:
            break
    return list(behind)


def _swap(old: Sequence[fx.Node], new: Sequence[fx.Node], users: Sequence[Sequence[fx.Node]]) -> None:
    for before, after, using in zip(old, new, users, strict=True):
        for user in using:
            user.replace_input_with(before, after)


def _select(expert_ids: Tensor, weights: Tensor, hidden: Tensor, keep: Tensor, *, top_k: int, sort: bool) -> tuple[Tensor, ...]:
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
