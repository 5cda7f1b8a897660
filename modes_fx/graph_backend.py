"""``torch.compile(model, backend="modes_fx", options={"plan": plan})``: the bare backend, which sees graphs and no model.

What ``optimize`` knows from the model has to come from the graphs here: the layer from the path of its experts' weights, the
modality from ``input_ids`` or from ``modes_fx.token_modality``.

NOTE [modality over graph breaks] Whole models often break into several graphs: the one that embeds ``input_ids`` runs before
those with the decoder layers. It publishes its tokens, and each layer may take them once. A layer that asks twice would get
those of an older forward, and gets an error instead. So does one whose model was compiled with other options, and one more than
the plan has layers; two models that are compiled alike with a plan that does not know the layers cannot be told apart.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, fx

from modes_fx import modality
from modes_fx.backend import Compiled, SkipBackend, inductor, inductor_settings
from modes_fx.errors import ModalityError, ModesFxError, PlanError
from modes_fx.modality import PADDING, TEXT, VISION, Tokens
from modes_fx.passes.skip_experts import Binding, Dispatch, Rewritten, source_of
from modes_fx.plan import SkipPlan
from modes_fx.policies import RULES, table_shape
from modes_fx.report import GraphReport

logger = logging.getLogger(__name__)


def modes_fx(
    module: fx.GraphModule, inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Compiled:
    """Compile one dynamo graph; dynamo finds this function through the entry point ``modes_fx``.

    Args:
        module: Dynamo's graph.
        inputs: Its example inputs.
        mode: An Inductor mode, such as ``"max-autotune-no-cudagraphs"``; ``torch.compile`` takes no options beside it.
        options: ``plan`` (a ``SkipPlan`` or a path; none keeps every expert), ``target``, ``dispatch``, ``vision_token_ids``
            (for a plan that names none), ``mode`` (as above), ``report`` (a ``modes_fx.GraphReport`` that is told of each
            graph); any other goes to Inductor.

    Raises:
        PlanError: The plan is unreadable, lacks the target, or there is a target without a plan.
        ModesFxError: An unknown dispatch or mode.
    """
    rest = dict(options or {})
    mode = rest.pop("mode", mode)
    report = rest.pop("report", None)
    plan = rest.pop("plan", None)
    if plan is not None and not isinstance(plan, SkipPlan):
        plan = SkipPlan.load(plan)
    target, dispatch = rest.pop("target", None), rest.pop("dispatch", "auto")
    if plan is None and target is not None:
        raise PlanError(f"A target ({target!r}) needs a plan that knows it: pass it as the option 'plan' beside.")
    if dispatch not in get_args(Dispatch):
        raise ModesFxError(f"Unknown dispatch {dispatch!r}; known: {', '.join(get_args(Dispatch))}.")
    runtime = GraphRuntime(module, plan, target, rest.pop("vision_token_ids", None), report, options)
    settings = {**inductor_settings(mode), **rest}
    backend = SkipBackend(runtime, RULES[plan.rule if plan else "threshold"].keep, dispatch, inductor)
    compiled = backend(module, inputs, **settings)
    return compiled if runtime.input_ids is None else runtime.publishing(compiled)


@dataclass(frozen=True)
class _Published:
    """The tokens of a forward, what their model was compiled with, and the layers (by their weights' ids) that took them."""

    tokens: Tokens
    options: Mapping[str, Any]
    taken_by: set[int] = field(default_factory=set)


_published: ContextVar[_Published | None] = ContextVar("modes_fx_published", default=None)


class GraphRuntime:
    """The run-time side of one graph; see ``backend.Runtime``.

    Args:
        module: Dynamo's graph, before it is rewritten.
        plan: The plan, or None to keep all pairs.
        target: One of its targets.
        vision_token_ids: Placeholder ids of visual tokens; None takes the plan's.
        report: Told of the graph's sites.
        options: All that the model was compiled with.
    """

    num_classes = PADDING + 1
    recording = False

    def __init__(
        self,
        module: fx.GraphModule,
        plan: SkipPlan | None,
        target: float | None,
        vision_token_ids: Sequence[int] | None,
        report: GraphReport | None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._plan = plan
        self._options = options or {}
        self._report = report
        sources = [source_of(node) for node in module.graph.nodes if node.op == "placeholder"]
        self._takes_experts = any("experts" in source for source in sources)
        named = {match[1]: i for i, source in enumerate(sources) if (match := re.search(r"\['(\w+)'\]$", source))}
        self.input_ids, self._attention_mask = named.get("input_ids"), named.get("attention_mask")
        self._vision_ids = tuple((plan.model.get("vision_token_ids", ()) if plan else ()) or vision_token_ids or ())
        if plan is not None and plan.mode != "fixed":
            raise PlanError(f"A plan of mode {plan.mode!r} needs modes_fx.optimize(model, plan).")
        name = plan.rule if plan else "threshold"
        rule = RULES[name]
        if rule.protects:
            raise PlanError(f"The keep-rule {name!r} observes attention, which no graph shows. Use modes_fx.optimize().")
        layers = len(plan.alpha or plan.tables or (1,)) if plan else 1
        self._takers = layers if plan and (plan.alpha or plan.tables) else math.inf
        self._keep = rule.keep
        self._tables = plan.table_tensors(layers) if plan and plan.tables else ()
        self._bounds = torch.full((layers, self.num_classes), rule.keep_all)
        self._bounds[:, PADDING] = rule.skip_all
        if plan is not None:
            self._bounds[:, :PADDING] = plan.bounds(layers, target)
        self._needs_modality = bool((self._bounds[:, TEXT] != self._bounds[:, VISION]).any())
        self._rows: dict[tuple[str, torch.device], tuple[int, Tensor]] = {}
        self._tables_on_device: dict[tuple[int, torch.device], Tensor] = {}

    def compiled(self, rewritten: Rewritten) -> None:
        """Say what was rewritten; experts that are computed whole are never passed off as optimised."""
        if self._report is not None:
            self._report.graphs.append(rewritten.records)
        rejected = [f"{record.code}: {record.detail}" for record in rewritten.records if record.status == "rejected"]
        if rejected or (self._takes_experts and not rewritten.bindings):
            reasons = "; ".join(rejected) or "it holds no dispatch; try model.set_experts_implementation('grouped_mm')"
            logger.warning("a graph computes experts; %d of its routing sites rewritten: %s", len(rewritten.bindings), reasons)
        else:
            logger.info("graph compiled: %d routing sites rewritten", len(rewritten.bindings))

    def bind(self, binding: Binding, inputs: Sequence[Any]) -> tuple[int, Tensor, Tensor]:
        """Return the layer's index, the classes of its tokens and its bounds; see ``backend.Runtime.bind``."""
        key = binding.sources[0], inputs[binding.weight_inputs[0]].device
        if key not in self._rows:
            layer = self._layer(binding.sources[0])
            self._rows[key] = layer, self._bounds[layer].to(key[1])
        layer, row = self._rows[key]
        classes = self._token_classes(binding.token_count(inputs), inputs[binding.weight_inputs[0]])
        return layer, classes, row

    def table(self, layer: int, binding: Binding, device: torch.device) -> Tensor:
        """Return the rule's table of a layer; see ``backend.Runtime.table``."""
        if (known := self._tables_on_device.get((layer, device))) is not None:
            return known
        shape = table_shape(self._keep, binding.record.num_experts)
        if tuple(self._tables[layer].shape) != shape:
            found = list(self._tables[layer].shape)
            raise PlanError(f"The plan's table of layer {layer} has shape {found}, the layer needs {list(shape)}.")
        self._tables_on_device[layer, device] = self._tables[layer].to(device)
        return self._tables_on_device[layer, device]

    def publishing(self, compiled: Compiled) -> Compiled:
        """Let a graph that has ``input_ids`` publish its tokens whenever it runs."""

        def run(*inputs: Any) -> Sequence[Any]:
            given, input_ids = modality.explicit(), inputs[self.input_ids]  # type: ignore[index]  # this graph has them
            unclear = self._needs_modality and not self._vision_ids
            stated = given is not None and (given.numel() == input_ids.numel() or unclear)
            tokens = None if stated else Tokens(self._classes_of(input_ids, inputs), "prefill")
            _published.set(None if tokens is None else _Published(tokens, self._options))
            return compiled(*inputs)

        return run

    def record(self, layer: int, top_k: int, token_class: Tensor, pairs: Tensor) -> None:
        """Never called: only ``optimize`` keeps statistics."""

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

    def _token_classes(self, tokens: int, weight: Tensor) -> Tensor:
        given, published = modality.explicit_flat(tokens, weight.device), _published.get()
        if given is not None:
            return given
        if published is not None and published.tokens.ids.numel() == tokens and self._may_take(published, weight):
            published.taken_by.add(id(weight))
            return published.tokens.flat(tokens, weight.device)
        if self._needs_modality:
            raise ModalityError(
                f"The modality of {tokens} tokens is unknown: no graph of this forward has input_ids of that many tokens. Call "
                "the model inside `with modes_fx.token_modality(ids):`, or use modes_fx.optimize(model, plan)."
            )
        return torch.zeros(tokens, dtype=torch.int64, device=weight.device)

    def _may_take(self, published: _Published, weight: Tensor) -> bool:
        # Equal options, not the same: of two models that are compiled alike, one may run graphs that the other made.
        new = id(weight) not in published.taken_by and len(published.taken_by) < self._takers
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
