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
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from modes_fx.passes import rowwise
from modes_fx.passes.site import Reject, RoutingSite

FORM = "grouped_mm"


def find(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the anchors: ``histc`` over sorted expert ids."""
    yield from (node for node in graph.nodes if _calls(node, torch.histc))


def match(histc: fx.Node) -> RoutingSite:
    """Walk outwards from the anchor.

    Raises:
        Reject: With the code ``NOT_A_DISPATCH``, ``EXPERT_PARALLEL``, ``WEIGHTS_HAVE_OTHER_USERS``, ``BODY_MIXES_ROWS``,
            ``BODY_HAS_FIXED_ROWS``, ``NO_EXPERT_WEIGHTS`` or ``OUTPUT_WIDTH``.
    """
    sorted_ids = _one_input(histc, "float", "int", "to")
    if not (_is_getitem(sorted_ids, 0) and _calls(_input(sorted_ids), torch.sort)):
        raise Reject("NOT_A_DISPATCH", "histc does not count sorted expert ids", histc)
    sort = _input(sorted_ids)
    perm = _only(sort, lambda node: _is_getitem(node, 1), "sort has no permutation")
    offsets = _only(histc, lambda node: _calls(node, torch.cumsum), "histc is not summed to offsets")
    pair_token = _only(perm, lambda node: _calls(node, operator.floordiv), "no perm // K")
    num_experts, top_k = histc.kwargs.get("bins"), pair_token.args[1]
    if not isinstance(num_experts, int) or not isinstance(top_k, int):
        raise Reject("NOT_A_DISPATCH", "the number of experts or K is not a constant", histc, pair_token)
    if any(node.target == "clamp_" for node in sorted_ids.users):
        raise Reject("EXPERT_PARALLEL", "expert ids hold sentinels of expert parallelism", sorted_ids)

    gathered = _only(pair_token, _is_tensor_gather, "hidden rows are not gathered once")
    hidden = _input(gathered)
    weights_g = _only(perm, lambda node: _is_tensor_gather(node) and node.args[1] is perm, "weights are not sorted")
    inverse = _only(perm, lambda node: _calls(node, torch.empty_like), "no inverse permutation")
    restored = _only(inverse, lambda node: _is_tensor_gather(node) and node.args[1] is inverse, "order not restored")
    weighted = _input(restored)
    view = _only(restored, lambda node: _method(node, "view"), "pairs are not summed a token")
    combined = _only(view, lambda node: _method(node, "sum"), "pairs are not summed a token")
    _check_sum(view, combined, hidden, top_k)
    _check_weights(weights_g, weighted)
    by_expert = [node for node in sorted_ids.users if _is_tensor_gather(node) and node.args[1] is sorted_ids]  # biases
    body = _body([gathered, weights_g, *by_expert], weighted)
    gemms = [node for node in body if offsets in node.all_input_nodes]
    filling = [node for node in inverse.users if _calls(node, operator.setitem)]  # inverse[perm] = arange(S)
    _check_users(sort, {sorted_ids, perm})
    _check_users(sorted_ids, {*by_expert, *(node for node in histc.all_input_nodes if node is not sorted_ids), histc})
    _check_users(histc, {offsets})
    _check_users(offsets, set(gemms))
    _check_users(perm, {pair_token, weights_g, inverse, *filling, *(node for node in perm.users if _method(node, "size"))})
    _check_users(pair_token, {gathered})
    _check_users(inverse, {restored, *filling})
    _check_users(weighted, {restored})
    _check_users(restored, {view})
    _check_users(view, {combined})
    if not gemms:
        raise Reject("NOT_A_DISPATCH", "no grouped GEMM takes the offsets", offsets)
    if _shape(weighted)[-1] != _shape(hidden)[-1]:
        raise Reject("OUTPUT_WIDTH", "the experts' output is not as wide as their input", weighted, hidden)
    return RoutingSite(
        form=FORM,
        top_k=top_k,
        num_experts=num_experts,
        expert_ids_S=_input(sort).name,
        weights_S=_input(weights_g).name,
        hidden_TH=hidden.name,
        sorted_ids=sorted_ids.name,
        perm=perm.name,
        pair_token=pair_token.name,
        offsets=offsets.name,
        body=tuple(node.name for node in body),
        weighted=weighted.name,
        restored=restored.name,
        combined=combined.name,
        weight_inputs=_weight_inputs(gemms[0]),
    )


def _calls(node: fx.Node, target: Any) -> bool:
    return node.op == "call_function" and node.target is target


def _method(node: fx.Node, name: str) -> bool:
    return node.op == "call_method" and node.target == name


def _input(node: fx.Node, position: int = 0) -> fx.Node:
    source = node.args[position] if position < len(node.args) else None
    if not isinstance(source, fx.Node):
        raise Reject("NOT_A_DISPATCH", f"{node.name} is called with something else than a tensor", node)
    return source


def _is_getitem(node: fx.Node, index: int) -> bool:
    return _calls(node, operator.getitem) and isinstance(node.args[1], int) and node.args[1] == index


def _is_tensor_gather(node: fx.Node) -> bool:
    return _calls(node, operator.getitem) and isinstance(node.args[1], fx.Node)


def _only(node: fx.Node, accept: Callable[[fx.Node], bool], otherwise: str) -> fx.Node:
    """Return the node's one user of a kind."""
    found = [user for user in node.users if accept(user)]
    if len(found) != 1:
        raise Reject("NOT_A_DISPATCH", otherwise, node)
    return found[0]


def _check_users(node: fx.Node, known: set[fx.Node]) -> None:
    unknown = [user for user in node.users if user not in known]
    if unknown:
        raise Reject("NOT_A_DISPATCH", f"{node.name} is used outside the dispatch, by {unknown[0].name}", *unknown)


def _one_input(node: fx.Node, *conversions: str) -> fx.Node:
    """Return the node's first argument, looked at through a dtype conversion."""
    source = _input(node)
    return _input(source) if source.op == "call_method" and source.target in conversions else source


def _check_weights(weights_g: fx.Node, weighted: fx.Node) -> None:
    # A pair may be dropped only if a weight of 0 would have silenced it: the weight multiplies the experts' output, last.
    product = _calls(weighted, operator.mul) or _calls(weighted, torch.mul)
    column = [node for node in weighted.all_input_nodes if _method(node, "unsqueeze") and node.args[0] is weights_g]
    if not product or len(column) != 1 or set(weights_g.users) != set(column) or set(column[0].users) != {weighted}:
        raise Reject(
            "WEIGHTS_HAVE_OTHER_USERS", "the routing weights do more than multiply the experts' output", weights_g, weighted
        )


def _check_sum(view: fx.Node, combined: fx.Node, hidden: fx.Node, top_k: int) -> None:
    dim = combined.args[1] if len(combined.args) > 1 else combined.kwargs.get("dim")
    shape = _shape(view)
    if dim != 1 or len(shape) != 3 or shape[1] != top_k or shape[0] != _shape(hidden)[0]:
        raise Reject("NOT_A_DISPATCH", "pairs are not summed token by token", view, combined)


def _body(starts: list[fx.Node], end: fx.Node) -> list[fx.Node]:
    """Return, in graph order, all that runs on sorted rows: what depends on ``starts``, up to and with ``end``.

    In-place calls have no users but belong to it. Each node works row by row, and none but ``end`` is used outside.
    """
    inside = dict.fromkeys(starts)
    for node in end.graph.nodes:
        if node not in inside and any(source in inside and source is not end for source in node.all_input_nodes):
            inside[node] = None
    for node in inside:
        if node.op not in ("call_function", "call_method"):
            raise Reject("BODY_MIXES_ROWS", f"sorted rows reach {node.name} outside the dispatch", node)
        if node not in starts:
            rowwise.check(node, inside)
        if not node.users and not rowwise.is_in_place(node):
            raise Reject("BODY_MIXES_ROWS", f"sorted rows of {node.name} are left unused", node)
    if end not in inside:
        raise Reject("NOT_A_DISPATCH", "the gathered rows do not reach the output", end)
    position = {node: index for index, node in enumerate(end.graph.nodes)}
    return sorted(inside, key=position.__getitem__)


def _shape(node: fx.Node) -> torch.Size:
    shape: torch.Size = node.meta["example_value"].shape
    return shape


def _weight_inputs(gemm: fx.Node) -> tuple[str, ...]:
    """Return the placeholders that the GEMM's weight is made of: by them a layer is told from another at run time."""
    found: list[str] = []
    queue = [node for node in gemm.args[1:2] if isinstance(node, fx.Node)]
    while queue:
        node = queue.pop(0)
        value = node.meta.get("example_value")
        if node.op == "placeholder" and isinstance(value, torch.Tensor) and value.dim() >= 2:
            found.append(node.name)
        queue.extend(node.all_input_nodes)
    if not found:
        raise Reject("NO_EXPERT_WEIGHTS", "the experts' weights are not inputs of the graph", gemm)
    return tuple(found)
