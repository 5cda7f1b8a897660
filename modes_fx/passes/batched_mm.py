"""Find the ``batched_mm`` dispatch of transformers in dynamo's graph.

IR level: dynamo's (torch IR), before AOT. Emitted by every family whose experts use transformers' ``batched_mm``
(``transformers.integrations.moe``), to which ``generate`` switches for decoding off the CPU. Rows stay in pair order, and each
has its own copy of its expert's weights. With T tokens, K experts a token, S = T * K pairs::

    x = repeat_interleave(hidden, K)
    y = activation(bmm(W1[expert_ids_S], x[:, :, None]).squeeze(-1) [+ b1[expert_ids_S]])
    y = bmm(W2[expert_ids_S], y[:, :, None]).squeeze(-1) [+ b2[expert_ids_S]]
    out = (y * weights_S[:, None]).view(T, K, H).sum(1)

or ``bmm(x[:, None], W1[expert_ids_S])`` where weights are transposed. Refused on purpose: as in ``grouped_mm``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from modes_fx.passes.rowwise import names_rows
from modes_fx.passes.site import Reject, RoutingSite
from modes_fx.passes.values import value_of
from modes_fx.passes.walk import (
    SENTINELS,
    argument,
    body_between,
    calls,
    check_sum,
    check_users,
    check_weights,
    constant,
    gathers,
    input_of,
    is_marker,
    is_method,
    only_user,
    shape_of,
    weight_inputs,
)

FORM = "batched_mm"


def find(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the anchors: the first ``bmm`` with matrices gathered by each vector of expert ids."""
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        if calls(node, torch.bmm):
            for operand in node.all_input_nodes:
                if _gathers_matrices(operand) and input_of(operand, 1) not in seen:
                    seen.add(input_of(operand, 1))
                    yield node


def _gathers_matrices(node: fx.Node) -> bool:
    source = node.args[0] if gathers(node) else None
    value = value_of(source) if isinstance(source, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dim() == 3


def match(bmm: fx.Node) -> RoutingSite:
    """Walk outwards from the anchor.

    Raises:
        Reject: With the code ``NOT_A_DISPATCH``, ``EXPERT_PARALLEL``, ``WEIGHTS_HAVE_OTHER_USERS``, ``BODY_MIXES_ROWS``,
            ``BODY_HAS_FIXED_ROWS``, ``NO_EXPERT_WEIGHTS`` or ``OUTPUT_WIDTH``.
    """
    matrices = next(node for node in bmm.all_input_nodes if _gathers_matrices(node))
    expert_ids = input_of(matrices, 1)
    if is_method(expert_ids, "clamp"):
        raise Reject("EXPERT_PARALLEL", SENTINELS, expert_ids)
    repeated = _repeated(bmm, matrices)
    hidden = input_of(repeated)
    num_experts = constant(shape_of(input_of(matrices))[0], matrices)
    top_k = constant(argument(repeated, 1, "repeats"), repeated)
    view = _named_rows(bmm)
    weighted = input_of(view)
    combined = only_user(view, lambda node: is_method(node, "sum"), "pairs are not summed a token")
    check_sum(view, combined, hidden, top_k)
    weights = _weights(weighted)
    check_weights(weights, weighted)
    by_expert = [node for node in expert_ids.users if gathers(node, expert_ids)]  # matrices and biases
    body = body_between([repeated, *by_expert, *weights.users], weighted)
    for_marker = [node for node in expert_ids.users if is_method(node, "reshape") and all(map(is_marker, node.users))]
    check_users(expert_ids, [*by_expert, *for_marker])
    check_users(weighted, {view})
    check_users(view, {combined})
    return RoutingSite(
        form=FORM,
        anchor=bmm.name,
        top_k=top_k,
        num_experts=num_experts,
        expert_ids_S=expert_ids.name,
        weights_S=weights.name,
        hidden_TH=hidden.name,
        row_ids=expert_ids.name,
        row_weights=weights.name,
        row_hidden=repeated.name,
        perm=None,
        body=tuple(node.name for node in body),
        weighted=weighted.name,
        combined=combined.name,
        counting=(),
        scaffold=(repeated.name, view.name, combined.name),
        weight_inputs=weight_inputs(input_of(matrices)),
    )


def _repeated(bmm: fx.Node, matrices: fx.Node) -> fx.Node:
    """Return the tokens, each repeated for its K experts, that the first GEMM takes as columns or as rows."""
    vectors = next((node for node in bmm.all_input_nodes if node is not matrices), bmm)
    repeated = input_of(vectors) if is_method(vectors, "unsqueeze") else vectors
    if not is_method(repeated, "repeat_interleave") or argument(repeated, 2, "dim") != 0:
        raise Reject("NOT_A_DISPATCH", "the experts do not take the tokens, each repeated K times", bmm, repeated)
    return repeated


def _named_rows(bmm: fx.Node) -> fx.Node:
    """Return the first view, of what depends on the GEMM, that names the number of rows: no view within the body may."""
    after = {bmm}
    node: fx.Node
    for node in bmm.graph.nodes:
        if any(source in after for source in node.all_input_nodes):
            after.add(node)
            if is_method(node, "view") and names_rows(node):
                return node
    raise Reject("NOT_A_DISPATCH", "pairs are not summed a token", bmm)


def _weights(weighted: fx.Node) -> fx.Node:
    for node in weighted.all_input_nodes:
        if is_method(node, "unsqueeze") and is_method(input_of(node), "reshape"):
            return input_of(node)
    raise Reject("WEIGHTS_HAVE_OTHER_USERS", "the experts' output is not multiplied by the routing weights last", weighted)
