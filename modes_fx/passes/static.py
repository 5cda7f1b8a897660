"""Static dispatch: shapes never depend on data, so that nothing synchronises and CUDA graphs can capture it.

Rows sorted by expert (``grouped_mm``): dropped pairs get the id E, sort last and fall outside the GEMMs' offsets::

    ids = where(rule(weights_TK, bound[token_class]), expert_ids, E)
    ... the site's own sort, histogram (which counts ids below E only), body and un-permute ...
    weighted = where(ids_g < E, weighted, 0)

Rows in pair order (``batched_mm``): dropped pairs read an expert that is read anyway, the first that their token keeps::

    keep = rule(weights_TK, bound[token_class])
    ids = where(keep, expert_ids, expert_ids_TK[:, first kept])
    ... the site's own body ...
    weighted = where(keep, weighted, 0)

What the experts make of dropped rows is selected away, never multiplied by 0 (0 * NaN is NaN): past the last offset,
``torch._grouped_mm`` leaves *uninitialised* memory.

NOTE [why batched rows are not sorted] Sorted, with grouped GEMMs, dropped pairs would cost no row. But transformers switches
to this form where tokens are few and each launch counts (a sort, a histogram and a sum more), and in float32 its grouped GEMM
under a compiler reads the offsets on the host, which nothing can capture. A row that is computed in vain costs arithmetic,
and a copy of matrices where the compiler does not fuse their gather with the product, but its own expert's weights are not
read from memory, which is what decoding waits for: it shares those of another row of its token, which are in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from modes_fx.passes.emit import Emitter
from modes_fx.passes.site import RoutingSite
from modes_fx.policies import KeepRule, decide


def rewrite(graph: fx.Graph, site: RoutingSite, rule: KeepRule, token_class: fx.Node, *bounds: fx.Node) -> fx.Node:
    """Rewrite the site in ``graph``.

    Args:
        graph: A graph that holds the site's nodes.
        site: The matched site.
        rule: Which pairs to keep.
        token_class: Node, int64 [T].
        bounds: Node, float32 [number of classes]; then the layer's table, if the rule asks for one.

    Returns:
        The pair (token * K + rank) of each row, int64 [S]; -1 for a row that is selected away.
    """
    node = {item.name: item for item in graph.nodes}
    ids, weights, weighted = node[site.expert_ids_S], node[site.weights_S], node[site.weighted]
    known = {"rule": rule, "top_k": site.top_k}
    given = (ids, weights, token_class, *bounds)
    weighing = list(node[site.row_weights].users) if site.perm is None else [node[site.row_weights]]
    if site.perm is None:
        readers = list(ids.users)
        new_ids, keep, *new_weights = Emitter.after(ids, weights).trace(_redirect, *given, **known)
        for reader in readers:
            reader.replace_input_with(ids, new_ids)
        selected, pairs = Emitter.after(weighted).trace(_select_kept, weighted, keep)
    else:
        sorted_ids, perm = node[site.row_ids], node[site.perm]
        sort = perm.args[0]
        marked, *new_weights = Emitter(before=sort).trace(_mark, *given, **known, sentinel=site.num_experts)
        sort.replace_input_with(ids, marked)
        in_body = [user for user in sorted_ids.users if user.name in site.body]  # gathers of biases, by expert
        if in_body:
            (clamped,) = Emitter(before=in_body[0]).trace(_clamp, sorted_ids, largest=site.num_experts - 1)
            for user in in_body:
                user.replace_input_with(sorted_ids, clamped)
        selected, pairs = Emitter.after(weighted).trace(_select_sorted, weighted, sorted_ids, perm, sentinel=site.num_experts)
    for user in weighing:
        for replaced in new_weights:
            user.replace_input_with(weights, replaced)
    weighted.replace_all_uses_with(selected, delete_user_cb=lambda user: user is not selected)
    return pairs


def _mark(
    expert_ids: Tensor,
    weights: Tensor,
    token_class: Tensor,
    *bounds: Tensor,
    rule: KeepRule,
    top_k: int,
    sentinel: int,
) -> tuple[Tensor, ...]:
    keep, new_weights = decide(rule, expert_ids, weights, token_class, *bounds, top_k=top_k)
    ids = torch.where(keep.reshape(-1), expert_ids, sentinel)
    return (ids,) if new_weights is None else (ids, new_weights)


def _clamp(sorted_ids: Tensor, *, largest: int) -> Tensor:
    return sorted_ids.clamp(max=largest)


def _select_sorted(weighted: Tensor, sorted_ids: Tensor, perm: Tensor, *, sentinel: int) -> tuple[Tensor, Tensor]:
    keep = sorted_ids < sentinel
    return torch.where(keep.unsqueeze(1), weighted, 0.0), torch.where(keep, perm, -1)


def _redirect(
    expert_ids: Tensor, weights: Tensor, token_class: Tensor, *bounds: Tensor, rule: KeepRule, top_k: int
) -> tuple[Tensor, ...]:
    keep, new_weights = decide(rule, expert_ids, weights, token_class, *bounds, top_k=top_k)
    ids = expert_ids.reshape(-1, top_k)
    first = ids.gather(1, keep.to(torch.int8).argmax(1, keepdim=True))  # 0, the token's first pair, where it keeps none
    redirected = (torch.where(keep, ids, first).reshape(-1), keep.reshape(-1))
    return redirected if new_weights is None else (*redirected, new_weights)


def _select_kept(weighted: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    pair = torch.arange(keep.shape[0], device=keep.device)
    return torch.where(keep.unsqueeze(1), weighted, 0.0), torch.where(keep, pair, -1)
