"""The pass: every marked dispatch of a graph ends as rewritten, or as it was, with a named reason.

IR level: dynamo's (torch IR), before AOT. ``graph.marker`` says what a marker is::

    weights, keep = marker(weights_TK, ids_TK, classes_T, bounds, ...)          keep = rule(weights_TK, bounds[classes_T])
    out = dispatch(hidden_TH, ids_TK, weights)                                   out = dispatch of the pairs in keep alone

The graph is changed in place, since it stays dynamo's: inputs keep their marks, which CUDA graphs and AOT ask for, and none is
added. A marked dispatch that is left as it was computes the same, with the weights of dropped pairs 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from modes_fx.passes import batched_mm, compact, dense, grouped_mm, kept_blocks, kept_gemms, static
from modes_fx.passes.emit import Emitter, erase_unused
from modes_fx.passes.site import Reject, RoutingSite, SiteRecord
from modes_fx.passes.values import value_of
from modes_fx.passes.walk import is_getitem, is_marker
from modes_fx.policies import decide, rule_of

Dispatch = Literal["auto", "compact", "static"]

FORMS = (grouped_mm, batched_mm)
_REWRITES = {"compact": (compact, kept_gemms), "static": (static, kept_blocks)}
"""What computes kept pairs by torch's own GEMMs, and by kernels of ours."""
_VIEWS = {"reshape", "view", "flatten"}


def is_marked(graph: fx.Graph) -> bool:
    """Return whether a graph holds a marked dispatch."""
    return any(is_marker(node) for node in graph.nodes)


def skip_experts(graph: fx.Graph) -> tuple[SiteRecord, ...]:
    """Rewrite every marked dispatch of a dynamo graph, in place.

    Returns:
        One record for each marker, in the order of the graph.
    """
    markers = [node for node in graph.nodes if is_marker(node)]
    if not markers:
        return ()
    sites, refused = matched(graph)
    by_marker = {marker: site for site in sites if (marker := _marker_of(graph, site)) is not None}
    records = tuple(_rewrite(marker, by_marker.get(marker), refused) for marker in markers)
    if any(record.status == "rewritten" for record in records):
        dense.rewrite(graph)
    graph.lint()
    return records


def matched(graph: fx.Graph) -> tuple[list[RoutingSite], list[tuple[fx.Node, str, Reject]]]:
    """Return the routing sites of a graph, marked or not; and anchors that are none, with their form and the reason."""
    sites: list[RoutingSite] = []
    refused: list[tuple[fx.Node, str, Reject]] = []
    for form in FORMS:
        for anchor in form.find(graph):
            try:
                sites.append(form.match(anchor))
            except Reject as reason:
                refused.append((anchor, form.FORM, reason))
    return sites, refused


def _marker_of(graph: fx.Graph, site: RoutingSite) -> fx.Node | None:
    """Return the marker that a site's weights come from, through views alone."""
    node = next(item for item in graph.nodes if item.name == site.weights_S)
    while node.op == "call_method" and node.target in _VIEWS:
        node = node.args[0]
    marker = node.args[0] if is_getitem(node, 0) else None
    return marker if isinstance(marker, fx.Node) and is_marker(marker) else None


def _rewrite(marker: fx.Node, site: RoutingSite | None, refused: Iterable[tuple[fx.Node, str, Reject]]) -> SiteRecord:
    given: Any = marker.args
    weights, ids, classes, bounds, table, rule, dispatch, layer = given
    if site is None:
        return _left(marker, refused, layer)
    node = {item.name: item for item in marker.graph.nodes}
    hidden = value_of(node[site.hidden_TH])
    form = dispatch if dispatch != "auto" else ("compact" if hidden.device.type == "cpu" else "static")
    stock, ours = _REWRITES[form]
    why_not = ours.why_not(marker.graph, site)
    rewrite, gemms = (stock.rewrite, why_not) if why_not else (ours.rewrite, ours.kind(marker.graph, site))
    if form == "compact":
        _allow_kept_lengths(hidden)
    tensors = [item for item in (weights, ids, classes, bounds, table) if item is not None]
    decided = Emitter(before=marker.next).trace(_decide, *tensors, rule=rule)
    keep, new_weights = decided[0], decided[1] if len(decided) > 1 else weights
    try:
        rewrite(marker.graph, site, keep)
    except Reject as reason:
        erase_unused(decided)
        return SiteRecord(site.anchor, "", "rejected", reason.code, reason.detail, site.form, layer=layer)
    for index, now in enumerate((new_weights, keep)):
        for output in [user for user in marker.users if is_getitem(user, index)]:
            output.replace_all_uses_with(now)
            marker.graph.erase_node(output)
    marker.graph.erase_node(marker)
    source = source_of(node[site.weight_inputs[0]])
    record = SiteRecord(site.anchor, source, "rewritten", "", "", site.form, form, site.top_k, site.num_experts, gemms)
    return replace(record, layer=layer)


def _left(marker: fx.Node, refused: Iterable[tuple[fx.Node, str, Reject]], layer: int) -> SiteRecord:
    """Say why no dispatch was found behind a marker: the reason of an anchor on the same experts' ids, if there is one."""
    after: set[Any] = {marker, marker.args[1]}
    for node in marker.graph.nodes:
        if any(source in after for source in node.all_input_nodes):
            after.add(node)
    for anchor, form, reason in refused:
        if anchor in after:
            return SiteRecord(anchor.name, "", "rejected", reason.code, reason.detail, form, layer=layer)
    return SiteRecord(marker.name, "", "rejected", "NO_DISPATCH", "no expert dispatch takes the marked weights", layer=layer)


def _decide(
    weights: Tensor, ids: Tensor, classes: Tensor, bounds: Tensor, table: Tensor | None = None, *, rule: str
) -> tuple[Tensor, ...]:
    keep, new_weights = decide(rule_of(rule).keep, ids, weights, classes, bounds, table)
    return (keep,) if new_weights is None else (keep, new_weights)


def _allow_kept_lengths(value: Tensor) -> None:
    """Let this one trace hold lengths that depend on data (the number of kept pairs), which only fullgraph traces may."""
    if isinstance(value, FakeTensor) and value.fake_mode.shape_env is not None:
        shape_env = value.fake_mode.shape_env
        shape_env.settings = replace(shape_env.settings, allow_dynamic_output_shape_ops=True)


def source_of(placeholder: fx.Node) -> str:
    """Return dynamo's name of an input, such as ``L['input_ids']``."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return str(placeholder.target)
    return str(source.name() if callable(source.name) else source.name)  # a method in older torch
