"""What a matcher hands to a rewrite, and how it refuses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from modes_fx.passes.reasons import explained


class Reject(Exception):
    """Raised by a matcher that must leave a candidate alone; the driver records it.

    Args:
        code: Short upper-case name of the reason, one of ``reasons.REASONS``.
        detail: One sentence for a person.
        nodes: The graph nodes concerned.

    Raises:
        ValueError: Nothing explains the code.
    """

    def __init__(self, code: str, detail: str, *nodes: fx.Node) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = explained(code)
        self.detail = detail
        self.nodes = tuple(node.name for node in nodes)


@dataclass(frozen=True)
class RoutingSite:
    """One expert dispatch in a graph, by node name (names survive a copy of the graph, nodes do not).

    Shapes: T tokens, K experts a token, E experts, S = T * K pairs, H hidden.

    Attributes:
        form: Dispatch form, ``"grouped_mm"`` or ``"batched_mm"``.
        anchor: The node that was found first.
        top_k: K.
        num_experts: E.
        expert_ids_S: int64 [S], the expert of each pair.
        weights_S: [S], the number that multiplies the expert's output of each pair.
        hidden_TH: [T, H], the rows that are gathered for the experts.
        row_ids: int64 [S], the expert of each row that the experts compute.
        row_weights: [S], the weight of each row.
        row_hidden: [S, H], the hidden state of each row.
        perm: int64 [S], the pair of each row, where rows are sorted by expert; None where they stay in pair order.
        body: Nodes from ``row_hidden`` to ``weighted``, in graph order: everything that runs on rows.
        weighted: [S, H], expert outputs times weights.
        combined: [T, H], sum over a token's K pairs.
        counting: Nodes that count the rows of each expert; empty where GEMMs need no counts.
        scaffold: Nodes of no use where not all pairs are rows: the stock order, its undoing, the sum.
        weight_inputs: Placeholders from which the first GEMM's expert weights come.
    """

    form: str
    anchor: str
    top_k: int
    num_experts: int
    expert_ids_S: str
    weights_S: str
    hidden_TH: str
    row_ids: str
    row_weights: str
    row_hidden: str
    perm: str | None
    body: tuple[str, ...]
    weighted: str
    combined: str
    counting: tuple[str, ...]
    scaffold: tuple[str, ...]
    weight_inputs: tuple[str, ...]

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Return the users of a node that work on rows, or count them; a marker that reads it too is none."""
        mine = {*self.body, *self.counting}
        return [user for user in node.users if user.name in mine]


@dataclass(frozen=True)
class SiteRecord:
    """How one candidate site of a graph ended.

    Attributes:
        anchor: Name of the anchor node in dynamo's graph.
        source: Dotted path of the experts' first weight as dynamo saw it, or "" where it has none.
        status: ``"rewritten"`` or ``"rejected"``.
        code: Reason code of a rejection, one of ``reasons.REASONS``; else "".
        detail: A sentence on the reason, else "".
        form: Dispatch form found, ``"grouped_mm"`` or ``"batched_mm"``.
        dispatch: Form put in its place, ``"compact"`` or ``"static"``; "" when rejected.
        top_k: K, or 0 when unknown.
        num_experts: E, or 0 when unknown.
        gemms: ``"kernels"``, ``"packed kernels"`` or ``"Triton kernels"`` (``modes_fx.kernels``), the last perhaps with
            ``", and work on all rows between them"``; or why the experts' GEMMs are torch's own.
        layer: Index of the MoE layer, or -1 in a graph that serves many layers.
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
    gemms: str = ""
    layer: int = -1

    def __post_init__(self) -> None:
        if self.status == "rejected":
            explained(self.code)
