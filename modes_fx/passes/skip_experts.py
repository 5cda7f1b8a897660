"""The pass: every routing site of a graph ends as rewritten, or as rejected with a named reason."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch
from torch import fx

from modes_fx.passes import batched_mm, compact, dense, grouped_mm, kept_gemms, static
from modes_fx.passes.emit import fake_mode_of, under_fake
from modes_fx.passes.site import Reject, RoutingSite, SiteRecord
from modes_fx.policies import KeepRule, table_shape, takes_table

Dispatch = Literal["auto", "compact", "static"]

_FORMS = (grouped_mm, batched_mm)
_REWRITES = {"compact": compact.rewrite, "static": static.rewrite}


@dataclass(frozen=True)
class Binding:
    """What the caller of a rewritten graph must supply for one site, and what it gets back.

    Attributes:
        record: How the site was rewritten.
        weight_inputs: Positions, among the graph's inputs, of the experts' first weight.
        sources: Dynamo's names of those inputs.
        top_k: K.
        token_count: Computes T from the graph's run-time inputs.
    """

    record: SiteRecord
    weight_inputs: tuple[int, ...]
    sources: tuple[str, ...]
    top_k: int
    token_count: Callable[[Sequence[Any]], int]


@dataclass(frozen=True)
class Rewritten:
    """A rewritten copy of a graph.

    Its inputs are the original's, then two for each site: int64 [T] token classes and float32 [classes] bounds; and a third,
    the layer's float32 table, where the rule asks for one. Its outputs are the original's, then one for each site, ``pairs``:
    int64, the pair (token * K + rank) of each row that the experts compute, or -1 for a row that takes no part in the output.

    Attributes:
        module: The rewritten copy.
        extra_inputs: Fake tensors for the added inputs.
        bindings: One for each rewritten site, in the order of the added inputs.
        records: One for each candidate.
    """

    module: fx.GraphModule
    extra_inputs: tuple[Any, ...]
    bindings: tuple[Binding, ...]
    records: tuple[SiteRecord, ...]


def skip_experts(module: fx.GraphModule, rule: KeepRule, dispatch: Dispatch, num_classes: int) -> Rewritten:
    """Rewrite every routing site of a dynamo graph, in a copy.

    Dynamo reads its own placeholders after the backend returns, and AOT wants a source on each placeholder of a dynamo
    graph: adding inputs to the original breaks both.

    Args:
        module: Dynamo's graph; left as it is.
        rule: Which pairs to keep.
        dispatch: ``"compact"``, ``"static"`` or ``"auto"`` (compact on CPU, static elsewhere).
        num_classes: Length of the bounds.
    """
    sites: list[RoutingSite] = []
    rejected: list[SiteRecord] = []
    for form in _FORMS:
        for anchor in form.find(module.graph):
            try:
                sites.append(form.match(anchor))
            except Reject as reason:
                rejected.append(_rejection(anchor.name, reason, form.FORM))
    while True:
        try:
            return _rewrite_all(module, sites, rejected, rule, dispatch, num_classes)
        except _SiteRejectedError as refusal:  # the copy is half rewritten: begin anew without that site
            sites.remove(refusal.site)
            rejected.append(_rejection(refusal.site.anchor, refusal.reason, refusal.site.form))


def _rejection(anchor: str, reason: Reject, form: str) -> SiteRecord:
    return SiteRecord(anchor, "", "rejected", reason.code, reason.detail, form)


class _SiteRejectedError(Exception):
    def __init__(self, site: RoutingSite, reason: Reject) -> None:
        super().__init__(str(reason))
        self.site = site
        self.reason = reason


def _rewrite_all(
    module: fx.GraphModule,
    sites: Sequence[RoutingSite],
    rejected: Sequence[SiteRecord],
    rule: KeepRule,
    dispatch: Dispatch,
    num_classes: int,
) -> Rewritten:
    result = fx.GraphModule(module, copy.deepcopy(module.graph))
    graph = result.graph
    node = {item.name: item for item in graph.nodes}
    placeholders = [item for item in graph.nodes if item.op == "placeholder"]
    original = [item for item in module.graph.nodes if item.op == "placeholder"]
    position = {item.name: index for index, item in enumerate(placeholders)}

    added: list[list[fx.Node]] = []
    for index, site in enumerate(sites):
        hidden = node[site.hidden_TH].meta["example_value"]
        inputs: list[tuple[str, tuple[Any, ...], torch.dtype]] = [
            ("token_class", (hidden.shape[0],), torch.int64),
            ("bounds", (num_classes,), torch.float32),
        ]
        if takes_table(rule):
            inputs.append(("table", table_shape(rule, site.num_experts), torch.float32))
        added.append([_placeholder(graph, f"modes_fx_{name}_{index}", shape, kind, hidden) for name, shape, kind in inputs])

    bindings = []
    outputs: list[fx.Node] = []
    for index, site in enumerate(sites):
        hidden = node[site.hidden_TH].meta["example_value"]
        form = dispatch if dispatch != "auto" else ("compact" if hidden.device.type == "cpu" else "static")
        why_not = kept_gemms.why_not(graph, site) if form == "compact" else "static dispatch"
        rewrite, gemms = (_REWRITES[form], why_not) if why_not else (kept_gemms.rewrite, kept_gemms.kind(graph, site))
        try:
            token_count = _size_of(hidden.shape[0], original)
            outputs.append(rewrite(graph, site, rule, *added[index]))
        except Reject as reason:
            raise _SiteRejectedError(site, reason) from reason
        sources = tuple(source_of(original[position[name]]) for name in site.weight_inputs)
        sizes = (site.top_k, site.num_experts)
        record = SiteRecord(site.anchor, sources[0], "rewritten", "", "", site.form, form, *sizes, gemms)
        weight_inputs = tuple(position[name] for name in site.weight_inputs)
        bindings.append(Binding(record, weight_inputs, sources, site.top_k, token_count))
    if bindings:
        dense.rewrite(graph)
    output = next(item for item in graph.nodes if item.op == "output")
    output.args = ((*output.args[0], *outputs),)
    graph.lint()
    result.recompile()
    extra = tuple(item.meta["example_value"] for of_site in added for item in of_site)
    return Rewritten(result, extra, tuple(bindings), (*rejected, *(item.record for item in bindings)))


def _placeholder(graph: fx.Graph, name: str, shape: tuple[Any, ...], dtype: torch.dtype, like: torch.Tensor) -> fx.Node:
    last = [item for item in graph.nodes if item.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    with under_fake(fake_mode_of(graph)):
        node.meta["example_value"] = torch.empty(shape, dtype=dtype, device=like.device)
    return node


def _size_of(size: int | torch.SymInt, placeholders: Sequence[fx.Node]) -> Callable[[Sequence[Any]], int]:
    """Return a function of the graph's run-time inputs that computes a size that dynamo may have made symbolic.

    Raises:
        Reject: ``TOKENS_UNKNOWN`` when it depends on more than the inputs' sizes.
    """
    if isinstance(size, int):
        return lambda inputs: size
    expression = size.node.expr
    where: dict[sympy.Symbol, tuple[int, int | None]] = {}
    for position, placeholder in enumerate(placeholders):
        value = placeholder.meta.get("example_value")
        if isinstance(value, torch.SymInt):
            where.setdefault(value.node.expr, (position, None))
        elif isinstance(value, torch.Tensor):
            for dim, extent in enumerate(value.shape):
                if isinstance(extent, torch.SymInt):
                    where.setdefault(extent.node.expr, (position, dim))
    symbols = sorted(expression.free_symbols, key=str)
    if unknown := [str(symbol) for symbol in symbols if symbol not in where]:
        which = f"the number of tokens, {expression}, depends on data"
        raise Reject("TOKENS_UNKNOWN", f"{which}: no input of the graph has the size {', '.join(unknown)}")
    compute = sympy.lambdify(symbols, expression, modules="math")
    places = [where[symbol] for symbol in symbols]

    def size_of(inputs: Sequence[Any]) -> int:
        return int(compute(*(inputs[i] if dim is None else inputs[i].shape[dim] for i, dim in places)))

    return size_of


def source_of(placeholder: fx.Node) -> str:
    """Return dynamo's name of an input, such as ``L['input_ids']``."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return str(placeholder.target)
    return str(source.name() if callable(source.name) else source.name)  # a method in older torch
