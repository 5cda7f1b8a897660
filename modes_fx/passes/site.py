"""What a matcher hands to a rewrite, and how it refuses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx


class Reject(Exception):
    """Raised by a matcher that must leave a candidate alone; the driver records it.

    Args:
        code: Short upper-case name of the reason, stable across releases.
        detail: One sentence for a person.
        nodes: The graph nodes concerned.
    """

    def __init__(self, code: str, detail: str, *nodes: fx.Node) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.nodes = tuple(node.name for node in nodes)


@dataclass(frozen=True)
class RoutingSite:
    """One expert dispatch in a graph, by node name (names survive a copy of the graph, nodes do not).

    Shapes: T tokens, K experts a token, E experts, S = T * K pairs, H hidden.

    Attributes:
        form: Dispatch form, ``"grouped_mm"``.
        top_k: K.
        num_experts: E.
        expert_ids_S: int64 [S], the expert of each pair, before sorting.
        weights_S: [S], the number that multiplies the expert's output, before sorting.
        hidden_TH: [T, H], the rows that are gathered for the experts.
        sorted_ids: int64 [S], ascending expert ids.
        perm: int64 [S], the pair at each sorted position.
        pair_token: int64 [S], ``perm // K``.
        offsets: int32 [E], the end of each expert's rows.
        body: Nodes between the gathers and ``weighted``, in graph order: everything that runs on sorted rows.
        weighted: [S, H], expert outputs times weights, sorted.
        restored: [S, H], ``weighted`` back in pair order.
        combined: [T, H], sum over a token's K pairs.
        weight_inputs: Placeholders from which the first GEMM's expert weights come.
    """

    form: str
    top_k: int
    num_experts: int
    expert_ids_S: str
    weights_S: str
    hidden_TH: str
    sorted_ids: str
    perm: str
    pair_token: str
    offsets: str
    body: tuple[str, ...]
    weighted: str
    restored: str
    combined: str
    weight_inputs: tuple[str, ...]


@dataclass(frozen=True)
class SiteRecord:
    """How one candidate site of a graph ended.

    Attributes:
        anchor: Name of the anchor node in dynamo's graph.
        source: Dotted path of the experts' first weight as dynamo saw it, or "" where it has none.
        status: ``"rewritten"`` or ``"rejected"``.
        code: Reason code of a rejection, else "".
        detail: A sentence on the reason, else "".
        form: Dispatch form found, ``"grouped_mm"``.
        dispatch: Form put in its place, ``"compact"`` or ``"static"``; "" when rejected.
        top_k: K, or 0 when unknown.
        num_experts: E, or 0 when unknown.
    """

    anchor: str
    source: str
    status: str
    code: str = ""
    detail: str = ""
    form: str = ""
    dispatch: str = ""
    top_k: int = 0
    num_experts: int = 0
