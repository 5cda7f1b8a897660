"""Static dispatch: shapes never depend on data, so that nothing synchronises and CUDA graphs can capture it.

Rows sorted by expert (``grouped_mm``): dropped pairs get the id E, sort last and fall outside the GEMMs' offsets::

    ids = where(keep_TK, expert_ids, E)
    ... the site's own sort, histogram (which counts ids below E only), body and un-permute ...
    weighted = where(ids_g < E, weighted, 0)

Rows in pair order (``batched_mm``): dropped pairs read an expert that is read anyway, the first that their token keeps::

    ids = where(keep_TK, expert_ids, expert_ids_TK[:, first kept])
    ... the site's own body ...
    weighted = where(keep_TK, weighted, 0)

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


def rewrite(graph: fx.Graph, site: RoutingSite, keep: fx.Node) -> None:
    """Rewrite the site in ``graph``.

    Args:
        graph: A graph that holds the site's nodes.
        site: The matched site.
        keep: Node, bool [T, K], the pairs to compute.
    """
    node = {item.name: item for item in graph.nodes}
    ids, weighted = node[site.expert_ids_S], node[site.weighted]
    if site.perm is None:
        readers = site.readers(ids)
        new_ids, kept = Emitter.after(ids, keep).trace(_redirect, ids, keep, top_k=site.top_k)
        for reader in readers:
            reader.replace_input_with(ids, new_ids)
        (selected,) = Emitter.after(weighted).trace(_select_kept, weighted, kept)
    else:
        sorted_ids, perm = node[site.row_ids], node[site.perm]
        sort = perm.args[0]
        (marked,) = Emitter(before=sort).trace(_mark, ids, keep, sentinel=site.num_experts)
        sort.replace_input_with(ids, marked)
        in_body = [user for user in sorted_ids.users if user.name in site.body]  # gathers of biases, by expert
        if in_body:
            (clamped,) = Emitter(before=in_body[0]).trace(_clamp, sorted_ids, largest=site.num_experts - 1)
            for user in in_body:
                user.replace_input_with(sorted_ids, clamped)
        (selected,) = Emitter.after(weighted).trace(_select_sorted, weighted, sorted_ids, sentinel=site.num_experts)
    weighted.replace_all_uses_with(selected, delete_user_cb=lambda user: user is not selected)


def _mark(expert_ids: Tensor, keep: Tensor, *, sentinel: int) -> Tensor:
    return torch.where(keep.reshape(-1), expert_ids, sentinel)


def _clamp(sorted_ids: Tensor, *, largest: int) -> Tensor:
    return sorted_ids.clamp(max=largest)


def _select_sorted(weighted: Tensor, sorted_ids: Tensor, *, sentinel: int) -> Tensor:
    return torch.where((sorted_ids < sentinel).unsqueeze(1), weighted, 0.0)


def _redirect(expert_ids: Tensor, keep: Tensor, *, top_k: int) -> tuple[Tensor, ...]:
    ids = expert_ids.reshape(-1, top_k)
    first = ids.gather(1, keep.to(torch.int8).argmax(1, keepdim=True))  # 0, the token's first pair, where it keeps none
    return torch.where(keep, ids, first).reshape(-1), keep.reshape(-1)


def _select_kept(weighted: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep.unsqueeze(1), weighted, 0.0)
