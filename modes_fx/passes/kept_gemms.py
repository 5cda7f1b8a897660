"""Compact dispatch on a CPU, with kernels of our own for the experts' GEMMs.

For a ``RoutingSite`` of the form ``grouped_mm``, with R <= S = T * K kept pairs::

    pairs_R, offsets = sort_pairs(keep_TK, expert_ids)                                  data-dependent length
    y = linear(hidden_TH, pairs, W1, offsets)                                            gathers its rows itself
    ... the site's own work between the GEMMs, on R rows, which Inductor generates ...
    out = linear_combine(y, pairs, weights[pairs], W2, offsets)                          float32 [T, H], adds its rows up itself

See ``modes_fx/kernels`` for what they do. Where there is work between the second GEMM and the routing weights, that GEMM is a
``linear`` too, and rows are added up as in ``compact``. Not for gradients (the kernels have none), dtypes but float32 and
bfloat16, quantised weights, and weights that do not lie along the inner dimension: those sites take the form ``compact``.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from modes_fx.kernels.cpu.ops import DTYPES
from modes_fx.kernels.cpu.packed import PackedWeight
from modes_fx.passes.compact import add_rows, replace_rows
from modes_fx.passes.emit import Emitter, erase_dead
from modes_fx.passes.gemms import feeds_only, gemms_of, is_row_major, multiplied_last, stored_weight, uncast, weight_of
from modes_fx.passes.rowwise import is_in_place
from modes_fx.passes.site import RoutingSite
from modes_fx.passes.values import value_of
from modes_fx.passes.walk import argument, input_of


def why_not(graph: fx.Graph, site: RoutingSite) -> str:
    """Return why a site's GEMMs cannot be our kernels; "" where they can."""
    node = {item.name: item for item in graph.nodes}
    gemms = gemms_of(node, site)
    if site.perm is None or not gemms:
        return "its GEMMs are not those of grouped_mm"
    if value_of(node[site.hidden_TH]).device.type not in ("cpu", "meta"):  # meta: what a CPU would get
        return "not on a CPU"
    if torch.is_grad_enabled():
        return "gradients are on: run under torch.no_grad() or torch.inference_mode()"
    for gemm in gemms:
        rows, weight = input_of(gemm), stored_weight(gemm)
        if not is_row_major(gemm):
            return "its weights lie along their outer dimension: optimize(..., prepack=True) turns them"
        value = value_of(weight)
        if is_traceable_wrapper_subclass(value) and not isinstance(value, PackedWeight):
            return f"weights stored as {type(value).__name__}"
        dtypes = {value_of(item).dtype for item in (rows, weight)}
        if len(dtypes) > 1 or not dtypes <= DTYPES or argument(gemm, 3, "bias") is not None:
            return f"GEMMs of {' and '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}"
    return ""


def kind(graph: fx.Graph, site: RoutingSite) -> str:
    """Return which kernels a site's GEMMs will be."""
    node = {item.name: item for item in graph.nodes}
    packed = [isinstance(value_of(stored_weight(gemm)), PackedWeight) for gemm in gemms_of(node, site)]
    return "packed kernels" if all(packed) else "kernels"


def rewrite(graph: fx.Graph, site: RoutingSite, keep: fx.Node) -> None:
    """Rewrite a site for which ``why_not`` has nothing to say; see ``compact.rewrite``."""
    node = {item.name: item for item in graph.nodes}
    ids, weights, hidden = node[site.expert_ids_S], node[site.weights_S], node[site.hidden_TH]
    stock = [node[site.row_ids], node[site.row_weights], node[site.row_hidden]]
    users = [site.readers(item) for item in stock]
    pairs, offsets, pair_token, *rows = Emitter.after(ids, weights, hidden, keep).trace(
        _select, ids, weights, hidden, keep, top_k=site.top_k, num_experts=site.num_experts
    )
    replace_rows(stock, rows, users, pairs, until=node[site.weighted])
    row_weights, row_hidden = rows[1:]
    combined, weighted = node[site.combined], node[site.weighted]
    gemms = gemms_of(node, site)
    dtype = value_of(combined).dtype
    last = multiplied_last(weighted, gemms)
    gathers = feeds_only(row_hidden, gemms)  # else the rows have to be there, for others or to be changed
    for gemm in gemms:
        if gemm is last:
            continue
        takes = [input_of(gemm), weight_of(gemm), offsets]
        if gathers and uncast(takes[0]) is row_hidden:
            takes = [hidden, weight_of(gemm), offsets, pairs]
        (product,) = Emitter(before=gemm).trace(_linear, *takes, top_k=site.top_k)
        gemm.replace_all_uses_with(product)
    if last is None:
        (summed,) = Emitter(before=combined).trace(add_rows, weighted, pair_token, hidden, dtype=dtype)
    else:
        given = [input_of(last), pairs, row_weights, weight_of(last), offsets, hidden]
        (summed,) = Emitter(before=combined).trace(_linear_combine, *given, top_k=site.top_k, dtype=dtype)
    combined.replace_all_uses_with(summed)
    replaced = [node[name] for name in (*site.scaffold, *site.body, *site.counting) if not is_in_place(node[name])]
    erase_dead([*replaced, pair_token, *rows])


def _select(
    expert_ids: Tensor, weights: Tensor, hidden: Tensor, keep: Tensor, *, top_k: int, num_experts: int
) -> tuple[Tensor, ...]:
    sorted_ = torch.ops.modes_fx.sort_pairs.default(keep.reshape(-1), expert_ids, num_experts)
    pairs, offsets = sorted_[0], sorted_[1]
    pair_token = pairs // top_k
    return pairs, offsets, pair_token, expert_ids[pairs], weights[pairs], hidden[pair_token]


def _linear(x: Tensor, weight: Tensor, offsets: Tensor, pairs: Tensor | None = None, *, top_k: int) -> Tensor:
    product: Tensor = torch.ops.modes_fx.linear.default(x, pairs, top_k, weight, offsets)
    return product


def _linear_combine(
    x: Tensor, pairs: Tensor, row_weights: Tensor, weight: Tensor, offsets: Tensor, hidden: Tensor, *, top_k: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    tokens = hidden.shape[0]
    total: Tensor = torch.ops.modes_fx.linear_combine.default(x, pairs, top_k, row_weights.float(), weight, offsets, tokens)
    return total.to(dtype)
