"""``torch.compile(model, backend="modes_fx", options={"plan": plan})``: the bare backend, which sees graphs and no model.

A graph of an optimised model holds markers, and its thresholds with them. In the graph of a stock model this backend marks the
sites itself. What ``optimize`` knows from the model then has to come from the graphs: the layer from the path of its experts'
weights, the modality from ``input_ids`` or from ``modes_fx.token_modality``.

NOTE [modality over graph breaks] Whole models often break into several graphs: the one that embeds ``input_ids`` runs before
those with the decoder layers. It publishes its tokens, and each layer may take them once. A layer that asks twice would get
those of an older forward, and gets an error instead. So does one whose model was compiled with other options, and one more than
the plan has layers; two models that are compiled alike with a plan that does not know the layers cannot be told apart.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
import weakref
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from modes_fx import modality
from modes_fx.errors import ModalityError, ModesFxError, PlanError
from modes_fx.graph.backend import Compiled, inductor, inductor_settings, rewrite
from modes_fx.modality import PADDING, TEXT, VISION
from modes_fx.passes.emit import Emitter
from modes_fx.passes.mark_sites import Given, mark_sites
from modes_fx.passes.site import RoutingSite, SiteRecord
from modes_fx.passes.skip_experts import Dispatch, is_marked, source_of
from modes_fx.passes.values import value_of
from modes_fx.plan import SkipPlan
from modes_fx.policies import RULES, key_of
from modes_fx.report import GraphReport

logger = logging.getLogger(__name__)

_KEPT_BY_THE_MODEL = ("plan", "target", "dispatch", "vision_token_ids")


def modes_fx(
    module: fx.GraphModule, inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Compiled:
    """Compile one dynamo graph; dynamo finds this function through the entry point ``modes_fx``.

    Args:
        module: Dynamo's graph.
        inputs: Its example inputs.
        mode: An Inductor mode, such as ``"max-autotune-no-cudagraphs"``; ``torch.compile`` takes no options beside it.
        options: ``plan`` (a ``SkipPlan`` or a path; none keeps every expert), ``target``, ``dispatch`` (see
            ``modes_fx.optimize``; ``"compact"`` also spares the arithmetic of ``batched_mm`` on a GPU, at the cost of waiting
            for it), ``vision_token_ids`` (for a plan that names none), ``mode`` (as above, since it may not stand beside
            options), ``report`` (a ``modes_fx.GraphReport`` that is told of each graph); any other goes to Inductor. An
            optimised model has the first four of its own.

    Raises:
        PlanError: The plan is unreadable, lacks the target, or there is a target without a plan.
        ModesFxError: An unknown dispatch, mode or option, or options that an optimised model has of its own.
    """
    rest = dict(options or {})
    mode = rest.pop("mode", mode)
    report = rest.pop("report", None)
    settings = {name: rest.pop(name) for name in _KEPT_BY_THE_MODEL if name in rest}
    rest = inductor_settings(mode, rest)
    if is_marked(module.graph):
        if settings:
            raise ModesFxError(
                f"This model was optimised: give {', '.join(settings)} to modes_fx.optimize() or set_plan(), not the backend."
            )
        sites = rewrite(module, **rest)
        _say(report, sites, takes_experts=True)
        return inductor(module, inputs, **rest)
    marking = Marking(module, options=options, **settings)
    rejected = mark_sites(module.graph, partial(marking.given, module.graph), key_of(marking.rule), marking.dispatch)
    sites = (*rejected, *rewrite(module, **rest))
    _say(report, sites, takes_experts=marking.takes_experts)
    return marking.around(inductor(module, inputs, **rest))


def _say(report: GraphReport | None, sites: tuple[SiteRecord, ...], *, takes_experts: bool) -> None:
    """Say what was rewritten; experts that are computed whole are never passed off as optimised."""
    if report is not None:
        report.graphs.append(sites)
    rejected = [f"{site.code}: {site.detail}" for site in sites if site.status == "rejected"]
    rewritten = len(sites) - len(rejected)
    if rejected or (takes_experts and not rewritten):
        reasons = "; ".join(rejected) or "it holds no dispatch; try model.set_experts_implementation('grouped_mm')"
        logger.warning("a graph computes experts; %d of its routing sites rewritten: %s", rewritten, reasons)
    else:
        logger.info("graph compiled: %d routing sites rewritten", rewritten)


@dataclass(frozen=True)
class _Published:
    """The tokens of a forward, what their model was compiled with, and the layers that took them.

    Attributes:
        classes: int64 [B, S].
        options: The model's.
        taken_by: What tells the layers apart: the addresses of their weights.
        on_device: int64 [T], by device.
    """

    classes: Tensor
    options: Mapping[str, Any]
    taken_by: set[Any] = field(default_factory=set)
    on_device: dict[torch.device, Tensor] = field(default_factory=dict)


_published: ContextVar[_Published | None] = ContextVar("modes_fx_published", default=None)
_markings: weakref.WeakValueDictionary[int, Marking] = weakref.WeakValueDictionary()  # each lives as long as its graph
_serial = itertools.count()


class Marking:
    """What the markers of one stock graph take.

    Args:
        module: Dynamo's graph.
        plan: The plan or its path, or None to keep all pairs.
        target: One of its targets.
        dispatch: See ``passes.skip_experts``.
        vision_token_ids: Placeholder ids of visual tokens; None takes the plan's.
        options: All that the model was compiled with.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        plan: Any = None,
        target: float | None = None,
        dispatch: Dispatch = "auto",
        vision_token_ids: Sequence[int] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if plan is not None and not isinstance(plan, SkipPlan):
            plan = SkipPlan.load(plan)
        if plan is None and target is not None:
            raise PlanError(f"A target ({target!r}) needs a plan that knows it: pass it as the option 'plan' beside.")
        if dispatch not in get_args(Dispatch):
            raise ModesFxError(f"Unknown dispatch {dispatch!r}; known: {', '.join(get_args(Dispatch))}.")
        if plan is not None and plan.mode != "fixed":
            raise PlanError(f"A plan of mode {plan.mode!r} needs modes_fx.optimize(model, plan).")
        self.dispatch: Dispatch = dispatch
        self.rule = plan.rule if plan else "threshold"
        self._rule = rule = RULES[self.rule]
        if rule.protects:
            raise PlanError(f"The keep-rule {self.rule!r} observes attention, which no graph shows. Use modes_fx.optimize().")
        if rule.decode_only or rule.reroute:
            raise PlanError(
                f"The keep-rule {self.rule!r} is about decode steps, of which no graph knows. Use modes_fx.optimize()."
            )
        self._plan: SkipPlan | None = plan
        self._options = options or {}
        self._serial = next(_serial)
        _markings[self._serial] = self
        sources = [source_of(node) for node in module.graph.nodes if node.op == "placeholder"]
        self.takes_experts = any("experts" in source for source in sources)
        named = {match[1]: i for i, source in enumerate(sources) if (match := re.search(r"\['(\w+)'\]$", source))}
        self._input_ids, self._attention_mask = named.get("input_ids"), named.get("attention_mask")
        self._vision_ids = tuple((plan.model.get("vision_token_ids", ()) if plan else ()) or vision_token_ids or ())
        layers = len(plan.alpha or plan.tables or (1,)) if plan else 1
        self._takers = layers if plan and (plan.alpha or plan.tables) else math.inf
        self._tables = plan.table_tensors(layers) if plan and plan.tables else ()
        self._bounds = torch.full((layers, PADDING + 1), rule.keep_all, device="cpu")
        self._bounds[:, PADDING] = rule.skip_all
        if plan is not None:
            self._bounds[:, :PADDING] = plan.bounds(layers, target)
        self._needs_modality = bool((self._bounds[:, TEXT] != self._bounds[:, VISION]).any())

    def given(self, graph: fx.Graph, site: RoutingSite) -> Given:
        """Put a site's classes, bounds and table into the graph: see ``passes.mark_sites``."""
        node = {item.name: item for item in graph.nodes}
        hidden, weight = node[site.hidden_TH], node[site.weight_inputs[0]]
        layer = self._layer(source_of(weight))
        shape = self._rule.table_shape(site.num_experts) if self._rule.has_table else ()
        if shape and self._tables and tuple(self._tables[layer].shape) != shape:
            found = list(self._tables[layer].shape)
            raise PlanError(f"The plan's table of layer {layer} has shape {found}, the layer needs {list(shape)}.")
        plain = not is_traceable_wrapper_subclass(value_of(weight))
        known = {"serial": self._serial, "layer": layer, "place": site.anchor, "table": list(shape)}
        classes, bounds, table = Emitter.after(hidden, weight).trace(_given, hidden, *([weight] if plain else []), **known)
        return classes, bounds, table if shape else None

    def around(self, compiled: Compiled) -> Compiled:
        """Return the compiled graph; one that has ``input_ids`` publishes its tokens whenever it runs."""

        def run(*inputs: Any) -> Sequence[Any]:
            if self._input_ids is None:
                return compiled(*inputs)
            given, input_ids = modality.explicit(), inputs[self._input_ids]
            unclear = self._needs_modality and not self._vision_ids
            stated = given is not None and (given.numel() == input_ids.numel() or unclear)
            _published.set(None if stated else _Published(self._classes_of(input_ids, inputs), self._options))
            return compiled(*inputs)

        return run

    def classes(self, hidden_TH: Tensor, layer: Any) -> Tensor:
        """Return the classes of the tokens that a layer runs on, int64 [T], when it runs."""
        tokens, device, published = hidden_TH.shape[0], hidden_TH.device, _published.get()
        given = modality.explicit()
        if given is not None and given.numel() == tokens:
            return given.reshape(-1).to(device)
        if published is not None and published.classes.numel() == tokens and self._may_take(published, layer):
            published.taken_by.add(layer)
            if device not in published.on_device:
                published.on_device[device] = published.classes.reshape(-1).to(device)
            return published.on_device[device]
        if self._needs_modality:
            raise ModalityError(
                f"The modality of {tokens} tokens is unknown: no graph of this forward has input_ids of that many tokens. Call "
                "the model inside `with modes_fx.token_modality(ids):`, or use modes_fx.optimize(model, plan)."
            )
        return torch.zeros(tokens, dtype=torch.int64, device=device)

    def bounds_and_table(self, layer: int, shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return a layer's bounds, float32 [classes], and its table, of a shape."""
        table = self._tables[layer] if self._tables else torch.zeros(list(shape), device="cpu")
        return self._bounds[layer].to(device, copy=True), table.to(device, copy=True)

    def _layer(self, source: str) -> int:
        if self._plan is None or (self._plan.alpha is None and self._plan.tables is None):
            return 0
        path = ".".join(part for part in re.findall(r"\['(\w+)'\]", source)[1:-1])
        fits = [i for i, name in enumerate(self._plan.layers) if name == path or name.endswith(f".{path}")]
        if len(fits) != 1:
            raise PlanError(
                f"The plan has importances by layer, but which layer {source} belongs to cannot be told from its path "
                f"({len(fits)} of {len(self._plan.layers)} fit). Compile the whole model, or use modes_fx.optimize()."
            )
        return fits[0]

    def _may_take(self, published: _Published, layer: Any) -> bool:
        # Equal options, not the same: of two models that are compiled alike, one may run graphs that the other made.
        new = layer not in published.taken_by and len(published.taken_by) < self._takers
        return new and published.options == self._options

    def _classes_of(self, input_ids: Tensor, inputs: Sequence[Any]) -> Tensor:
        if self._needs_modality and not self._vision_ids:
            raise ModalityError(
                'The plan has other thresholds for visual tokens, but names no placeholder ids. Pass options={"plan": plan, '
                '"vision_token_ids": [...]} with the config\'s image_token_id and video_token_id.'
            )
        ids = torch.isin(input_ids, torch.tensor(self._vision_ids, dtype=torch.int64, device=input_ids.device)).to(torch.int64)
        mask = inputs[self._attention_mask] if self._attention_mask is not None else None
        if mask is not None and mask.dim() == 2 and mask.shape[1] >= ids.shape[1]:
            ids = ids.masked_fill(mask[:, -ids.shape[1] :] == 0, PADDING)
        return ids


_library = torch.library.Library("modes_fx", "FRAGMENT")
# It asks the process, not its arguments, which no captured CUDA graph can.
_library.define(
    "given(Tensor hidden, Tensor? weight, int serial, int layer, str place, int[] table) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.cudagraph_unsafe,),
)


def _given_now(
    hidden: Tensor, weight: Tensor | None, serial: int, layer: int, place: str, table: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    marking = _markings[serial]
    classes = marking.classes(hidden, place if weight is None else weight.data_ptr())
    return classes.clone(), *marking.bounds_and_table(layer, table, hidden.device)


def _given_fake(
    hidden: Tensor, weight: Tensor | None, serial: int, layer: int, place: str, table: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape[0], dtype=torch.int64),
        hidden.new_empty(PADDING + 1, dtype=torch.float32),
        hidden.new_empty(table, dtype=torch.float32),
    )


_library.impl("given", _given_now, "CompositeExplicitAutograd")
torch.library.register_fake("modes_fx::given", _given_fake)


def _given(hidden: Tensor, weight: Tensor | None = None, **known: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = torch.ops.modes_fx.given.default(hidden, weight, *known.values())
    return given[0], given[1], given[2]
