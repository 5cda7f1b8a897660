"""Static dispatch on an NVIDIA GPU, with kernels of our own: shapes are fixed, and work is done for kept pairs alone.

For a ``RoutingSite`` of the form ``grouped_mm``, with S = T * K pairs::

    experts_S = where(keep_TK, expert_ids, E)
    key, order = sort(experts_S)                         dropped pairs last
    blocks = cut_rows(ends of each expert in key)
    y = block_linear(hidden_TH, order, blocks, W1)       gathers its rows itself; gates, activations, biases within
    z = block_linear(y, order, blocks, W2)               back in the order of pairs; biases within
    out = pair_sum(z, experts_S, weights)

What a site does between its GEMMs is generated into their programs, see ``epilogue``; what cannot be stays in the graph, on S
rows of which those behind the last block hold no data.

Where there are no more pairs than experts, nothing is sorted: rows are pairs, a program computes one of them
(``pair_linear``), or adds up those of one token (``pair_combine``). See ``modes_fx/kernels/cuda`` for what the operations do.

Sizes of programs are those of a table, or where Inductor's ``max_autotune`` is set several, of which the first call takes the
fastest.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from modes_fx.kernels.cuda.sizes import flattened, pair_sizes_to_try, sizes_to_try, takes_pairs
from modes_fx.passes.emit import Emitter, erase_dead
from modes_fx.passes.epilogue import Epilogue, epilogue_of, leaves_rows_alone, point_behind_changes
from modes_fx.passes.gemms import feeds_only, gemms_of, is_row_major, stored_weight, uncast, weight_of
from modes_fx.passes.rowwise import is_in_place
from modes_fx.passes.site import RoutingSite
from modes_fx.passes.values import value_of
from modes_fx.passes.walk import argument, input_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(graph: fx.Graph, site: RoutingSite) -> str:
    """Return why a site's GEMMs cannot be our kernels; "" where they can."""
    node = {item.name: item for item in graph.nodes}
    gemms = gemms_of(node, site)
    if site.perm is None or not gemms:
        return "its GEMMs are not those of grouped_mm"
    if _capability(value_of(node[site.hidden_TH]).device) is None:
        return "not on an NVIDIA GPU of compute capability 8.0 or more, with Triton"
    if torch.is_grad_enabled():
        return "gradients are on: run under torch.no_grad() or torch.inference_mode()"
    for gemm in gemms:
        value = value_of(stored_weight(gemm))
        if is_traceable_wrapper_subclass(value):
            return f"weights stored as {type(value).__name__}"
        dtypes = {value_of(item).dtype for item in (input_of(gemm), stored_weight(gemm))}
        if len(dtypes) > 1 or not dtypes <= set(_DTYPES) or argument(gemm, 3, "bias") is not None:
            return f"GEMMs of {' and '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}"
    before = _before(gemms[-1], node, site)
    if not set(gemms) <= before or any(user not in before for item in before - {gemms[-1]} for user in item.users):
        return "its rows are used behind its last GEMM too"
    return ""


def kind(graph: fx.Graph, site: RoutingSite) -> str:
    """Return which kernels a site's GEMMs will be, and whether they do all that is between them."""
    node = {item.name: item for item in graph.nodes}
    within = leaves_rows_alone(_epilogues(node, site), node[site.weighted])
    return "Triton kernels" if within else "Triton kernels, and work on all rows between them"


def rewrite(graph: fx.Graph, site: RoutingSite, keep: fx.Node) -> None:
    """Rewrite a site for which ``why_not`` has nothing to say; see ``static.rewrite``."""
    import_module("modes_fx.kernels.cuda.ops")  # where there is Triton
    node = {item.name: item for item in graph.nodes}
    ids, weights, hidden = node[site.expert_ids_S], node[site.weights_S], node[site.hidden_TH]
    combined, weighted, gathered = node[site.combined], node[site.weighted], node[site.row_hidden]
    gemms = gemms_of(node, site)
    before, epilogues = _before(gemms[-1], node, site), _epilogues(node, site)
    stock = [node[site.row_ids], node[site.row_weights], gathered]
    users = [[user for user in site.readers(item) if user.name not in site.counting] for item in stock]

    rows = _rows_an_expert(value_of(ids).shape[0], site)
    names = {"top_k": site.top_k, "num_experts": site.num_experts}
    emitter = Emitter.after(ids, weights, hidden, keep)
    (experts,) = emitter.trace(_experts, ids, keep, num_experts=site.num_experts)
    if rows is None:
        taken = [ids, weights, *emitter.trace(_pair_hidden, hidden, top_k=site.top_k)]
        place: tuple[fx.Node, ...] = (experts,)
    else:
        size = _sizes(gemms[0], rows, 1)[0]
        order, blocks, *taken = emitter.trace(_sort, experts, ids, weights, hidden, rows=size, **names)
        place = order, blocks
    for old, new, pairs, readers in zip(stock, taken, (ids, weights, gathered), users, strict=True):
        for user in readers:
            user.replace_input_with(old, new if user in before else pairs)  # behind the last GEMM rows are pairs

    gathers = feeds_only(taken[2], gemms)  # else the rows have to be there, for others or to be changed
    total = None
    for gemm in gemms:
        last, takes_tokens, epilogue = gemm is gemms[-1], gathers and uncast(input_of(gemm)) is taken[2], epilogues[gemm]
        alone = last and set(epilogue.end.users) == {weighted}
        given = hidden if takes_tokens else input_of(gemm), weight_of(gemm), *place
        biases = () if epilogue.bias is None else (epilogue.bias,)
        settings: dict[str, Any] = {
            "top_k": site.top_k if takes_tokens else 0,
            "epilogue": epilogue.text,
            "sizes": _sizes(gemm, rows, 1 + bool(epilogue.parts)),
        }
        emitter = Emitter(before=epilogue.end)
        if alone and rows is None and not epilogue.parts:
            (total,) = emitter.trace(_pair_combine, *given, weights, *biases, **{**settings, "top_k": site.top_k})
            continue
        linear = _pair_linear if rows is None else _block_linear
        (product,) = emitter.trace(linear, *given, *biases, **settings, parts=epilogue.parts, scatter=last)
        epilogue.end.replace_all_uses_with(product)
    if total is None:
        summed = (product, experts, weights) if alone else (weighted, experts)
        (total,) = Emitter(before=combined).trace(_pair_sum, *summed, **names)
    (total,) = Emitter(before=combined).trace(_cast, total, dtype=value_of(combined).dtype)
    combined.replace_all_uses_with(total)
    within = {item for epilogue in epilogues.values() for item in epilogue.nodes}
    replaced = [node[name] for name in (*site.scaffold, *site.body, *site.counting)]
    erase_dead([*(item for item in replaced if item in within or not is_in_place(item)), *taken])


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


def _epilogues(node: dict[str, fx.Node], site: RoutingSite) -> dict[fx.Node, Epilogue]:
    """Return what each GEMM's program computes besides."""
    body = [node[name] for name in site.body]
    point_behind_changes(body)
    return {gemm: epilogue_of(gemm, body, node[site.row_ids]) for gemm in gemms_of(node, site)}


def _rows_an_expert(pairs: int | torch.SymInt, site: RoutingSite) -> float | None:
    """Return the mean number; None where pairs are computed one by one."""
    if isinstance(pairs, int) and takes_pairs(pairs, site.num_experts):
        return None
    return (pairs if isinstance(pairs, int) else pairs.node.hint or 0) / site.num_experts


def _sizes(gemm: fx.Node, rows: float | None, parts: int) -> list[int]:
    """Return the size of a GEMM's program, or those to try, as the operations take them."""
    if rows is None:
        pair_sizes = pair_sizes_to_try(is_row_major(gemm), parts)
        return flattened(pair_sizes if inductor_config.max_autotune else pair_sizes[:1])
    capability = _capability(value_of(gemm).device)
    assert capability is not None, "why_not has asked"
    sizes = sizes_to_try(capability, rows, parts)
    return flattened(sizes if inductor_config.max_autotune else sizes[:1])


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
    x: Tensor, weight: Tensor, order: Tensor, blocks: Tensor, bias: Tensor | None = None, *, top_k: int, scatter: bool,
    parts: str, epilogue: str, sizes: list[int],
) -> Tensor:  # fmt: skip
    y: Tensor = torch.ops.modes_fx.block_linear.default(x, order, blocks, weight, bias, top_k, scatter, parts, epilogue, sizes)
    return y


def _pair_linear(
    x: Tensor, weight: Tensor, experts: Tensor, bias: Tensor | None = None, *, top_k: int, scatter: bool, parts: str,
    epilogue: str, sizes: list[int],
) -> Tensor:  # fmt: skip
    y: Tensor = torch.ops.modes_fx.pair_linear.default(x, experts, weight, bias, top_k or 1, parts, epilogue, sizes)
    return y


def _pair_combine(
    x: Tensor, weight: Tensor, experts: Tensor, weights: Tensor, bias: Tensor | None = None, *, top_k: int, epilogue: str,
    sizes: list[int],
) -> Tensor:  # fmt: skip
    total: Tensor = torch.ops.modes_fx.pair_combine.default(x, experts, weights, weight, bias, top_k, epilogue, sizes)
    return total


def _pair_sum(y: Tensor, experts: Tensor, weights: Tensor | None = None, *, top_k: int, num_experts: int) -> Tensor:
    total: Tensor = torch.ops.modes_fx.pair_sum.default(y, experts, weights, top_k, num_experts)
    return total


def _cast(total: Tensor, *, dtype: torch.dtype) -> Tensor:
    return total.to(dtype)
