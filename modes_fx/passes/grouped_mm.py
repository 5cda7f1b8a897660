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
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from modes_fx.passes.site import Reject, RoutingSite

FORM = "grouped_mm"


def find(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the anchors: ``histc`` over sorted expert ids."""
    yield from (node for node in graph.nodes if _calls(node, torch.histc))


def match(histc: fx.Node) -> RoutingSite:
    """Walk outwards from the anchor.

    Raises:
        Reject: With the code ``NOT_A_DISPATCH``, ``EXPERT_PARALLEL``, ``WEIGHTS_HAVE_OTHER_USERS``, ``BODY_MIXES_ROWS``,
            ``NO_EXPERT_WEIGHTS`` or ``OUTPUT_WIDTH``.
    """
    sorted_ids = _one_input(histc, "float", "int", "to")
    if not (_is_getitem(sorted_ids, 0) and _calls(_input(sorted_ids), torch.sort)):
        raise Reject("NOT_A_DISPATCH", "histc does not count sorted expert ids", histc)
    sort = _input(sorted_ids)
    perm = _only(sort.users, lambda node: _is_getitem(node, 1), "sort has no permutation", sort)
    offsets = _only(histc.users, lambda node: _calls(node, torch.cumsum), "histc is not summed to offsets", histc)
    num_experts = histc.kwargs.get("bins")
    pair_token = _only(perm.users, lambda node: _calls(node, operator.floordiv), "no perm // K", perm)
    top_k = pair_token.args[1]
    if not isinstance(num_experts, int) or not isinstance(top_k, int):
        raise Reject("NOT_A_DISPATCH", "the number of experts or K is not a constant", histc, pair_token)
    if any(node.target == "clamp_" for node in sorted_ids.users):
        raise Reject("EXPERT_PARALLEL", "expert ids hold sentinels of expert parallelism", sorted_ids)

    gathered = _only(pair_token.users, _is_tensor_gather, "hidden rows are not gathered once", pair_token)
    hidden = _input(gathered)
    weights_g = _only(perm.users, lambda node: _is_tensor_gather(node) and node.args[1] is perm, "weights are not sorted", perm)
    inverse = _only(perm.users, lambda node: _calls(node, torch.empty_like), "no inverse permutation", perm)
    restored = _only(
        inverse.users, lambda node: _is_tensor_gather(node) and node.args[1] is inverse, "order not restored", inverse
    )
    weighted = _input(restored)
    view = _only(restored.users, lambda node: _method(node, "view"), "pairs are not summed a token", restored)
    combined = _only(view.users, lambda node: _method(node, "sum"), "pairs are not summed a token", view)
    _check_weights(weights_g, weighted)
    body = _body((gathered, weights_g), weighted)
    _check_rows(body, gathered)
    gemms = [node for node in body if offsets in node.all_input_nodes]
    if not gemms or set(offsets.users) - set(gemms):
        raise Reject("NOT_A_DISPATCH", "the offsets do not go to grouped GEMMs alone", offsets)
    _check_other_users(perm, {pair_token, weights_g, inverse} | _inverse_writers(inverse), body)
    if _width(weighted) != _width(hidden):
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


def _only(nodes: Iterable[fx.Node], accept: Callable[[fx.Node], bool], otherwise: str, *concerned: fx.Node) -> fx.Node:
    found = [node for node in nodes if accept(node)]
    if len(found) != 1:
        raise Reject("NOT_A_DISPATCH", otherwise, *concerned)
    return found[0]


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


def _body(starts: tuple[fx.Node, ...], end: fx.Node) -> list[fx.Node]:
    """Return, in graph order, the nodes on a path from a start to the end, both included."""
    after: set[fx.Node] = set(starts)
    for node in end.graph.nodes:
        if any(source in after for source in node.all_input_nodes):
            after.add(node)
    before: set[fx.Node] = {end}
    for node in reversed(end.graph.nodes):
        if node in before:
            before.update(node.all_input_nodes)
    return [node for node in end.graph.nodes if node in after and node in before]


def _check_rows(body: list[fx.Node], gathered: fx.Node) -> None:
    rows = gathered.meta["example_value"].shape[0]
    inside = set(body)
    for node in body:
        value = node.meta.get("example_value")
        tensors = value if isinstance(value, (tuple, list)) else (value,)
        if any(isinstance(item, torch.Tensor) and (item.dim() == 0 or item.shape[0] != rows) for item in tensors):
            raise Reject("BODY_MIXES_ROWS", f"{node.name} does not work row by row", node)
        if any(user not in inside for user in node.users) and node is not body[-1]:
            raise Reject("BODY_MIXES_ROWS", f"sorted rows of {node.name} are used outside the dispatch", node)


def _inverse_writers(inverse: fx.Node) -> set[fx.Node]:
    return {node for node in inverse.users if _calls(node, operator.setitem)}


def _check_other_users(perm: fx.Node, known: set[fx.Node], body: list[fx.Node]) -> None:
    unknown = [node for node in perm.users if node not in known and node not in body and not _method(node, "size")]
    if unknown:
        raise Reject("NOT_A_DISPATCH", "the permutation is used for something else too", *unknown)


def _width(node: fx.Node) -> Any:
    return node.meta["example_value"].shape[-1]


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
