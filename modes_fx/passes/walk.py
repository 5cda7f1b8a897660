"""Steps that matchers take from an anchor through dynamo's graph, and the checks that every dispatch must pass."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from modes_fx.passes import rowwise
from modes_fx.passes.site import Reject
from modes_fx.passes.values import value_of

SENTINELS = "expert ids hold sentinels of expert parallelism: use modes_fx.optimize(), with transformers from 5.21 on"


def calls(node: fx.Node, *targets: Any) -> bool:
    """Return whether a node calls one of these functions."""
    return node.op == "call_function" and any(node.target is target for target in targets)


def is_method(node: fx.Node, name: str) -> bool:
    """Return whether a node calls this method of a tensor."""
    return node.op == "call_method" and node.target == name


def is_getitem(node: fx.Node, index: int) -> bool:
    """Return whether a node takes one entry of a tuple."""
    return calls(node, operator.getitem) and isinstance(node.args[1], int) and node.args[1] == index


def gathers(node: fx.Node, index: fx.Node | None = None) -> bool:
    """Return whether a node is ``source[index]`` with a tensor as index, this one if given."""
    found = node.args[1] if calls(node, operator.getitem) else None
    return isinstance(found, fx.Node) and index in (None, found)


def is_marker(node: fx.Node) -> bool:
    """Return whether a node is the marker of a dispatch; see ``graph.marker``."""
    return node.op == "call_function" and str(node.target) == "modes_fx.keep.default"


def argument(node: fx.Node, position: int, name: str) -> Any:
    """Return an argument however it was passed; None where it was not."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)


def input_of(node: fx.Node, position: int = 0) -> fx.Node:
    """Return one of a node's arguments, a node itself."""
    source = node.args[position] if position < len(node.args) else None
    if not isinstance(source, fx.Node):
        raise Reject("NOT_A_DISPATCH", f"{node.name} is called with something else than a tensor", node)
    return source


def only_user(node: fx.Node, accept: Callable[[fx.Node], bool], otherwise: str) -> fx.Node:
    """Return the node's one user of a kind."""
    found = [user for user in node.users if accept(user)]
    if len(found) != 1:
        raise Reject("NOT_A_DISPATCH", otherwise, node)
    return found[0]


def shape_of(node: fx.Node) -> torch.Size:
    """Return the shape of a node's example value."""
    shape: torch.Size = value_of(node).shape
    return shape


def constant(value: Any, *nodes: fx.Node) -> int:
    """Return a number that belongs to the model, K or E, as an int.

    Where dynamo was told that every size varies, K is symbolic: it is made a constant then, and dynamo guards on it.
    """
    if isinstance(value, fx.Node):
        value = value_of(value)
    if isinstance(value, int) or (isinstance(value, torch.SymInt) and not free_unbacked_symbols(value)):
        return int(value)
    raise Reject("NOT_A_DISPATCH", "the number of experts or K is not a constant", *nodes)


def check_users(node: fx.Node, known: Collection[fx.Node]) -> None:
    """Refuse a node that is used by others than those known."""
    unknown = [user for user in node.users if user not in known]
    if unknown:
        raise Reject("NOT_A_DISPATCH", f"{node.name} is used outside the dispatch, by {unknown[0].name}", *unknown)


def check_weights(row_weights: fx.Node, weighted: fx.Node) -> None:
    """Refuse routing weights that do anything but multiply the experts' output, last."""
    # A pair may be dropped only if a weight of 0 would have silenced it.
    column = [node for node in weighted.all_input_nodes if is_method(node, "unsqueeze") and node.args[0] is row_weights]
    only = len(column) == 1 and set(row_weights.users) == set(column) and set(column[0].users) == {weighted}
    if not (calls(weighted, operator.mul, torch.mul) or is_method(weighted, "mul")) or not only:
        raise Reject(
            "WEIGHTS_HAVE_OTHER_USERS", "the routing weights do more than multiply the experts' output", row_weights, weighted
        )


def check_sum(view: fx.Node, combined: fx.Node, hidden: fx.Node, top_k: int) -> None:
    """Refuse pairs that are not summed token by token, or to another width than they had."""
    shape = shape_of(view)
    if argument(combined, 1, "dim") != 1 or len(shape) != 3 or shape[1] != top_k or shape[0] != shape_of(hidden)[0]:
        raise Reject("NOT_A_DISPATCH", "pairs are not summed token by token", view, combined)
    if shape[2] != shape_of(hidden)[1]:
        raise Reject("OUTPUT_WIDTH", "the experts' output is not as wide as their input", view, hidden)


def body_between(starts: list[fx.Node], end: fx.Node, offsets: fx.Node | None = None) -> list[fx.Node]:
    """Return, in graph order, all that runs on rows of pairs: what depends on ``starts``, up to and with ``end``.

    In-place calls have no users but belong to it. Each node works row by row, and none but ``end`` is used outside.
    ``offsets`` are the ends of the groups of rows, where rows are sorted by expert.
    """
    inside = dict.fromkeys(starts)
    for node in end.graph.nodes:
        if node not in inside and any(source in inside and source is not end for source in node.all_input_nodes):
            inside[node] = None
    for node in inside:
        if node.op not in ("call_function", "call_method"):
            raise Reject("BODY_MIXES_ROWS", f"rows of pairs reach {node.name} outside the dispatch", node)
        if node not in starts:
            rowwise.check(node, inside, offsets)
        if not node.users and not rowwise.is_in_place(node):
            raise Reject("BODY_MIXES_ROWS", f"rows of pairs of {node.name} are left unused", node)
    if end not in inside:
        raise Reject("NOT_A_DISPATCH", "the gathered rows do not reach the output", end)
    return in_order(inside)


def in_order(nodes: Collection[fx.Node]) -> list[fx.Node]:
    """Sort nodes as they stand in their graph."""
    wanted = set(nodes)
    return [node for node in next(iter(wanted)).graph.nodes if node in wanted] if wanted else []


def weight_inputs(weight: fx.Node) -> tuple[str, ...]:
    """Return the placeholders that experts' weights are made of: by them a layer is told from another at run time."""
    found: list[str] = []
    queue = [weight]
    seen: set[fx.Node] = set()  # or what several nodes share would be walked once for each way to it
    while queue:
        node = queue.pop(0)
        if node in seen:
            continue
        seen.add(node)
        value = value_of(node) if node.op == "placeholder" else None
        if isinstance(value, torch.Tensor) and value.dim() >= 2:
            found.append(node.name)
        queue.extend(node.all_input_nodes)
    if not found:
        raise Reject("NO_EXPERT_WEIGHTS", "the experts' weights are not inputs of the graph", weight)
    return tuple(found)
