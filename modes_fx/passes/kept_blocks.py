"""Static dispatch on an NVIDIA GPU, with kernels of our own: shapes are fixed, and work is done for kept pairs alone.

For a ``RoutingSite`` of the form ``grouped_mm``, with S = T * K pairs::

    experts_S = where(keep_TK, expert_ids, E)
    key, order = sort(experts_S)                         dropped pairs last
    blocks = cut_rows(ends of each expert in key)
    y = block_linear(hidden_TH, order, blocks, W1)       gathers its rows itself; SiLU and GELU gating within
    ... the site's own work up to its last GEMM, on S rows of which those behind the last block hold no data ...
    z = block_linear(y, order, blocks, W2)               back in the order of pairs
    out = pair_sum(z, experts_S, weights)

Where there are no more pairs than experts, nothing is sorted: rows are pairs, a program computes one of them
(``pair_linear``), or adds up those of one token (``pair_combine``). See ``modes_fx/kernels/cuda`` for what the operations do.
"""

from __future__ import annotations

import operator
from dataclasses import astuple
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from modes_fx.kernels.cuda.sizes import size_of, takes_pairs
from modes_fx.passes.emit import Emitter, erase_dead
from modes_fx.passes.gemms import feeds_only, gemms_of, multiplied_last, stored_weight, uncast, weight_of
from modes_fx.passes.rowwise import is_in_place
from modes_fx.passes.site import RoutingSite
from modes_fx.passes.walk import argument, calls, input_of, is_getitem, is_method

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(graph: fx.Graph, site: RoutingSite) -> str:
    """Return why a site's GEMMs cannot be our kernels; "" where they can."""
    node = {item.name: item for item in graph.nodes}
    gemms = gemms_of(node, site)
    if site.perm is None or not gemms:
        return "its GEMMs are not those of grouped_mm"
    if _capability(node[site.hidden_TH].meta["example_value"].device) is None:
        return "not on an NVIDIA GPU of compute capability 8.0 or more, with Triton"
    if torch.is_grad_enabled():
        return "gradients are on: run under torch.no_grad() or torch.inference_mode()"
    for gemm in gemms:
        value = stored_weight(gemm).meta["example_value"]
        if is_traceable_wrapper_subclass(value):
            return f"weights stored as {type(value).__name__}"
        dtypes = {item.meta["example_value"].dtype for item in (input_of(gemm), stored_weight(gemm))}
        if len(dtypes) > 1 or not dtypes <= set(_DTYPES) or argument(gemm, 3, "bias") is not None:
            return f"GEMMs of {' and '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}"
    before = _before(gemms[-1], node, site)
    if not set(gemms) <= before or any(user not in before for item in before - {gemms[-1]} for user in item.users):
        return "its rows are used behind its last GEMM too"
    return ""


def kind(graph: fx.Graph, site: RoutingSite) -> str:
    """Return which kernels a site's GEMMs will be."""
    return "Triton kernels"


def rewrite(graph: fx.Graph, site: RoutingSite, keep: fx.Node) -> None:
    """Rewrite a site for which ``why_not`` has nothing to say; see ``static.rewrite``."""
    import_module("modes_fx.kernels.cuda.ops")  # where there is Triton
    node = {item.name: item for item in graph.nodes}
    ids, weights, hidden = node[site.expert_ids_S], node[site.weights_S], node[site.hidden_TH]
    combined, weighted, gathered = node[site.combined], node[site.weighted], node[site.row_hidden]
    gemms = gemms_of(node, site)
    before, alone = _before(gemms[-1], node, site), multiplied_last(weighted, gemms)
    stock = [node[site.row_ids], node[site.row_weights], gathered]
    users = [[user for user in site.readers(item) if user.name not in site.counting] for item in stock]

    sizes = _sizes(ids.meta["example_value"].shape[0], site, node[site.row_hidden].meta["example_value"].device)
    names = {"top_k": site.top_k, "num_experts": site.num_experts}
    emitter = Emitter.after(ids, weights, hidden, keep)
    (experts,) = emitter.trace(_experts, ids, keep, num_experts=site.num_experts)
    if sizes is None:
        rows = [ids, weights, *emitter.trace(_pair_hidden, hidden, top_k=site.top_k)]
        place: tuple[fx.Node, ...] = (experts,)
    else:
        order, blocks, *rows = emitter.trace(_sort, experts, ids, weights, hidden, rows=sizes[0], **names)
        place = order, blocks
    for old, new, pairs, readers in zip(stock, rows, (ids, weights, gathered), users, strict=True):
        for user in readers:
            user.replace_input_with(old, new if user in before else pairs)  # behind the last GEMM rows are pairs

    gathers = feeds_only(rows[2], gemms)  # else the rows have to be there, for others or to be changed
    total = None
    for gemm in gemms:
        last, takes_tokens = gemm is gemms[-1], gathers and uncast(input_of(gemm)) is rows[2]
        given = hidden if takes_tokens else input_of(gemm), weight_of(gemm), *place
        if gemm is alone and sizes is None:
            (total,) = Emitter(before=gemm).trace(_pair_combine, *given, weights, top_k=site.top_k)
            continue
        gated, end = ("", gemm) if last else _gating(gemm)
        linear = _pair_linear if sizes is None else _block_linear
        settings: dict[str, Any] = {"top_k": site.top_k if takes_tokens else 0, "gated": gated, "scatter": last, "size": sizes}
        (product,) = Emitter(before=end).trace(linear, *given, **settings)
        end.replace_all_uses_with(product)
    if total is None:
        summed = (weighted, experts) if alone is None else (product, experts, weights)
        (total,) = Emitter(before=combined).trace(_pair_sum, *summed, **names)
    (total,) = Emitter(before=combined).trace(_cast, total, dtype=combined.meta["example_value"].dtype)
    combined.replace_all_uses_with(total)
    replaced = [node[name] for name in (*site.scaffold, *site.body, *site.counting) if not is_in_place(node[name])]
    erase_dead([*replaced, *rows])


@cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of a device that our kernels are for, else None."""
    if find_spec("triton") is None:
        return None
    if device.type == "meta":
        return 9, 0  # what a GPU would get
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    return capability if capability >= (8, 0) else None


def _before(last: fx.Node, node: dict[str, fx.Node], site: RoutingSite) -> set[fx.Node]:
    """Return the part of a site's body that its last GEMM depends on, itself with it."""
    body = [node[name] for name in site.body]
    found, size = {last}, 0
    while len(found) > size:
        size = len(found)
        for item in reversed(body):
            changes = is_in_place(item) and item.args[0] in found - {last}
            if changes or any(user in found for user in item.users):
                found.add(item)
    return found


def _sizes(pairs: int | torch.SymInt, site: RoutingSite, device: torch.device) -> list[int] | None:
    """Return the size of a program of ``block_linear``; None where pairs are computed one by one."""
    if isinstance(pairs, int) and takes_pairs(pairs, site.num_experts):
        return None
    usual = pairs if isinstance(pairs, int) else pairs.node.hint or 0
    capability = _capability(device)
    assert capability is not None, "why_not has asked"
    return list(astuple(size_of(capability, usual / site.num_experts)))


def _gating(gemm: fx.Node) -> tuple[str, fx.Node]:
    """Return the activation of the gating behind a GEMM, and the gated product; "" and the GEMM where it has another use."""
    nothing = "", gemm
    chunk = next(iter(gemm.users))
    if len(gemm.users) > 1 or not is_method(chunk, "chunk") or argument(chunk, 1, "chunks") != 2:
        return nothing
    halves = {index: user for index in (0, 1) for user in chunk.users if is_getitem(user, index)}
    if argument(chunk, 2, "dim") not in (-1, 1) or len(chunk.users) != 2 or len(halves) != 2:
        return nothing
    activated, gated = (next(iter(halves[index].users)) for index in (0, 1))
    if any(len(item.users) != 1 for item in (*halves.values(), activated)) or not calls(gated, operator.mul, torch.mul):
        return nothing
    name = _activation(activated)
    return (name, gated) if name and set(gated.args) == {activated, halves[1]} else nothing


def _activation(node: fx.Node) -> str:
    if calls(node, nn.functional.silu):
        return "silu"
    if calls(node, nn.functional.gelu):
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return ""


def _experts(expert_ids: Tensor, keep: Tensor, *, num_experts: int) -> Tensor:
    return torch.where(keep.reshape(-1), expert_ids, num_experts).to(torch.int32)


def _pair_hidden(hidden: Tensor, *, top_k: int) -> Tensor:
    return hidden.repeat_interleave(top_k, dim=0)


def _sort(
    experts: Tensor, ids: Tensor, weights: Tensor, hidden: Tensor, *, rows: int, top_k: int, num_experts: int
) -> tuple[Tensor, ...]:
    ordered = torch.sort(experts, stable=True)
    key, order = ordered[0], ordered[1]
    index = torch.arange(num_experts, dtype=torch.int32, device=hidden.device)
    ends = torch.searchsorted(key, index, right=True, out_int32=True)
    blocks = torch.ops.modes_fx.cut_rows.default(ends, order, rows)
    return order, blocks, ids[order], weights[order], hidden[order // top_k]


def _block_linear(
    x: Tensor, weight: Tensor, order: Tensor, blocks: Tensor, *, top_k: int, gated: str, scatter: bool, size: list[int]
) -> Tensor:
    y: Tensor = torch.ops.modes_fx.block_linear.default(x, order, blocks, weight, top_k, scatter, gated, size)
    return y


def _pair_linear(x: Tensor, weight: Tensor, experts: Tensor, *, top_k: int, gated: str, scatter: bool, size: None) -> Tensor:
    y: Tensor = torch.ops.modes_fx.pair_linear.default(x, experts, weight, top_k or 1, gated)
    return y


def _pair_combine(x: Tensor, weight: Tensor, experts: Tensor, weights: Tensor, *, top_k: int) -> Tensor:
    total: Tensor = torch.ops.modes_fx.pair_combine.default(x, experts, weights, weight, top_k)
    return total


def _pair_sum(y: Tensor, experts: Tensor, weights: Tensor | None = None, *, top_k: int, num_experts: int) -> Tensor:
    total: Tensor = torch.ops.modes_fx.pair_sum.default(y, experts, weights, top_k, num_experts)
    return total


def _cast(total: Tensor, *, dtype: torch.dtype) -> Tensor:
    return total.to(dtype)
