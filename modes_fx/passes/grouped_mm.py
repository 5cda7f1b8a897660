"""Find the ``grouped_mm`` dispatch of transformers in dynamo's graph.

IR level: dynamo's (torch IR), before AOT. Emitted by every family whose experts use transformers' ``grouped_mm``
(``transformers.integrations.moe``), bfloat16 and float32 alike. With T tokens, K experts a token, S = T * K pairs::

    ids_g, perm = sort(expert_ids_S)          pairs in expert order
    x = hidden[perm // K]                     w = weights_S[perm]
    offs = cumsum(histc(ids_g))
    y = weighted(GMM(activation(GMM(x, W1, offs)), W2, offs)) * w[:, None]
    out = y[inverse(perm)].view(T, K, H).sum(1)

The router in front is not looked at: every one of them hands ``(expert_ids, weights)`` to this dispatch.

Refused on purpose: expert parallelism (sentinel ids), weights that do anything but multiply the experts' output, and work
on the sorted rows that mixes rows.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from modes_fx.passes.site import Reject, RoutingSite
from modes_fx.passes.walk import (
    SENTINELS,
    body_between,
    calls,
    check_sum,
    check_users,
    check_weights,
    constant,
    gathers,
    in_order,
    input_of,
    is_getitem,
    is_method,
    only_user,
    weight_inputs,
)

FORM = "grouped_mm"


def find(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the anchors: ``histc`` over sorted expert ids."""
    yield from (node for node in graph.nodes if calls(node, torch.histc))


def match(histc: fx.Node) -> RoutingSite:
    """Walk outwards from the anchor.

    Raises:
        Reject: With the code ``NOT_A_DISPATCH``, ``EXPERT_PARALLEL``, ``WEIGHTS_HAVE_OTHER_USERS``, ``BODY_MIXES_ROWS``,
            ``BODY_HAS_FIXED_ROWS``, ``NO_EXPERT_WEIGHTS`` or ``OUTPUT_WIDTH``.
    """
    sorted_ids = _one_input(histc, "float", "int", "to")
    if not (is_getitem(sorted_ids, 0) and calls(input_of(sorted_ids), torch.sort)):
        raise Reject("NOT_A_DISPATCH", "histc does not count sorted expert ids", histc)
    sort = input_of(sorted_ids)
    perm = only_user(sort, lambda node: is_getitem(node, 1), "sort has no permutation")
    offsets = only_user(histc, lambda node: calls(node, torch.cumsum), "histc is not summed to offsets")
    pair_token = only_user(perm, lambda node: calls(node, operator.floordiv, torch.floor_divide), "no perm // K")
    num_experts, top_k = constant(histc.kwargs.get("bins"), histc), constant(pair_token.args[1], pair_token)
    if any(node.target == "clamp_" for node in sorted_ids.users):
        raise Reject("EXPERT_PARALLEL", SENTINELS, sorted_ids)

    gathered = only_user(pair_token, gathers, "hidden rows are not gathered once")
    hidden = input_of(gathered)
    weights_g = only_user(perm, lambda node: gathers(node, perm), "weights are not sorted")
    inverse = only_user(perm, lambda node: calls(node, torch.empty_like), "no inverse permutation")
    restored = only_user(inverse, lambda node: gathers(node, inverse), "order not restored")
    weighted = input_of(restored)
    view = only_user(restored, lambda node: is_method(node, "view"), "pairs are not summed a token")
    combined = only_user(view, lambda node: is_method(node, "sum"), "pairs are not summed a token")
    check_sum(view, combined, hidden, top_k)
    check_weights(weights_g, weighted)
    by_expert = [node for node in sorted_ids.users if gathers(node, sorted_ids)]  # biases
    body = body_between([gathered, weights_g, *by_expert], weighted, offsets)
    gemms = [node for node in body if offsets in node.all_input_nodes]
    counts = [node for node in histc.all_input_nodes if node is not sorted_ids]
    filling = [node for node in inverse.users if calls(node, operator.setitem)]  # inverse[perm] = arange(S)
    lengths = [node for node in perm.users if is_method(node, "size")]
    check_users(sort, {sorted_ids, perm})
    check_users(sorted_ids, {*by_expert, *counts, histc})
    check_users(histc, {offsets})
    check_users(offsets, gemms)
    check_users(perm, {pair_token, weights_g, inverse, *filling, *lengths})
    check_users(pair_token, {gathered})
    check_users(inverse, {restored, *filling})
    check_users(weighted, {restored})
    check_users(restored, {view})
    check_users(view, {combined})
    if not gemms:
        raise Reject("NOT_A_DISPATCH", "no grouped GEMM takes the offsets", offsets)
    numbers = [input_of(node, 2) for node in filling]
    if [node.args[1] for node in filling] != [perm] or not (calls(numbers[0], torch.arange) and len(numbers[0].args) == 1):
        raise Reject("NOT_A_DISPATCH", "order not restored", inverse)
    order = {sort, sorted_ids, perm, pair_token, gathered, weights_g, inverse, restored, view, combined}
    return RoutingSite(
        form=FORM,
        anchor=histc.name,
        top_k=top_k,
        num_experts=num_experts,
        expert_ids_S=input_of(sort).name,
        weights_S=input_of(weights_g).name,
        hidden_TH=hidden.name,
        row_ids=sorted_ids.name,
        row_weights=weights_g.name,
        row_hidden=gathered.name,
        perm=perm.name,
        body=tuple(node.name for node in body),
        weighted=weighted.name,
        combined=combined.name,
        counting=tuple(node.name for node in in_order({histc, offsets, *counts})),
        scaffold=tuple(node.name for node in in_order({*order, *filling, *numbers, *lengths})),
        weight_inputs=weight_inputs(input_of(gemms[0], 1)),
    )


def _one_input(node: fx.Node, *conversions: str) -> fx.Node:
    """Return the node's first argument, looked at through a dtype conversion."""
    source = input_of(node)
    return input_of(source) if source.op == "call_method" and source.target in conversions else source
