"""What compiled regions share at run time: the bounds of each layer, the forward's tokens, the counts."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modes_fx import modality
from modes_fx.budget import Budget
from modes_fx.errors import ModalityError, ModelError, NotOptimizedError, PlanError
from modes_fx.modality import CLASSES, PADDING, Tokens
from modes_fx.passes.site import SiteRecord
from modes_fx.passes.skip_experts import Binding, Rewritten
from modes_fx.policies import Rule, table_shape
from modes_fx.protection import check_observed
from modes_fx.regions import MoeLayer, running_region
from modes_fx.report import PHASES, SkipStats


class ModelRuntime:
    """The run-time side of one optimised model; see ``backend.Runtime``.

    Args:
        layers: The model's MoE layers.
        rule: The keep-rule compiled in.
    """

    def __init__(self, layers: Sequence[MoeLayer], rule: Rule) -> None:
        self.layers = tuple(layers)
        self.rule = rule
        self.num_classes = CLASSES * (2 if rule.protects else 1)  # protected tokens are classes of their own
        self.stats = SkipStats(tuple(layer.name for layer in layers))
        self.sites: dict[int, SiteRecord] = {}
        self.rejections: list[SiteRecord] = []
        self.graphs = 0
        self.keeps_all = True
        with torch.inference_mode(False):
            self._bounds = torch.full((len(PHASES), len(layers), self.num_classes), rule.keep_all)
            self._bounds[..., PADDING::CLASSES] = rule.skip_all
        self._given: Tensor | Budget | None = None
        self._budget: Budget | None = None
        self._on_device: dict[tuple[int, int, torch.device], Tensor] = {}
        self._tables: tuple[Tensor, ...] | None = None
        self._tables_on_device: dict[tuple[int, torch.device], Tensor] = {}
        # By the ids of weight and region; weak, since offloading makes new tensors.
        self._layer_of: dict[tuple[int, int], tuple[weakref.ref[Tensor], int]] = {}

    @property
    def recording(self) -> bool:
        """Whether dispatched pairs are counted."""
        return self.stats.recording or self._budget is not None

    @property
    def bounds_in_force(self) -> Tensor | Budget | None:
        """What ``set_bounds`` was given last."""
        return self._given.clone() if isinstance(self._given, Tensor) else self._given

    def set_bounds(self, bounds: Tensor | Budget | None) -> None:
        """Put new bounds in force; compiles nothing.

        Args:
            bounds: float32 [L, 2] for (text, vision), or [2, L, 2] where (prefill, decode) have bounds of their own; or what
                sets them as it goes. None keeps all pairs.
        """
        self._given = bounds.clone() if isinstance(bounds, Tensor) else bounds
        self._budget = bounds if isinstance(bounds, Budget) else None
        fixed = bounds.fixed if isinstance(bounds, Budget) else bounds
        self._bounds[..., :PADDING] = self.rule.keep_all if fixed is None else fixed
        self.keeps_all = bounds is None
        for (phase, layer, _), row in self._on_device.items():
            row.copy_(self._bounds[phase, layer])

    def set_tables(self, tables: Sequence[Tensor] | None) -> None:
        """Put other tables of the rule in force, float32, one a layer; compiles nothing. None: zeros."""
        before, self._tables = self._tables, None if tables is None else tuple(tables)
        try:
            new = {key: self._table(key[0], tuple(old.shape)) for key, old in self._tables_on_device.items()}
        except PlanError:
            self._tables = before
            raise
        for key, table in new.items():
            self._tables_on_device[key].copy_(table)

    def compiled(self, rewritten: Rewritten) -> None:
        """Take note of a graph that was compiled."""
        self.graphs += 1
        self.rejections = [record for record in rewritten.records if record.status == "rejected"]

    def bind(self, binding: Binding, inputs: Sequence[Any]) -> tuple[int, Tensor, Tensor]:
        """Return the layer's index, the classes of its tokens and its bounds; see ``backend.Runtime.bind``."""
        weights = [inputs[position] for position in binding.weight_inputs]
        region = running_region()
        known = self._layer_of.get((id(weights[0]), id(region)))
        layer = known[1] if known is not None and known[0]() is weights[0] else self._find(weights, binding, region)
        self.sites[layer] = binding.record
        device = weights[0].device
        token_class, running = self._token_classes(binding.token_count(inputs), device), modality.running()
        phase = 0 if running is None else PHASES.index(running.phase)
        if self._budget is not None and running is not None and running.phase == "prefill":
            return layer, token_class, self._budget.row(layer, running, token_class)
        row = self._on_device.get((phase, layer, device))
        if row is None:
            with torch.inference_mode(False):
                row = self._on_device[phase, layer, device] = self._bounds[phase, layer].clone().to(device)
        if self.rule.protects and not self.keeps_all:
            check_observed(running, self.layers[layer].name)
        return layer, token_class, row

    def table(self, layer: int, binding: Binding, device: torch.device) -> Tensor:
        """Return the rule's table of a layer; see ``backend.Runtime.table``."""
        known = self._tables_on_device.get((layer, device))
        if known is None:
            shape = table_shape(self.rule.keep, binding.record.num_experts)
            with torch.inference_mode(False):
                known = self._tables_on_device[layer, device] = self._table(layer, shape).clone().to(device)
        return known

    def _table(self, layer: int, shape: tuple[int, ...]) -> Tensor:
        if self._tables is None:
            return torch.zeros(shape)
        if tuple(self._tables[layer].shape) != shape:
            raise PlanError(
                f"The plan's table for {self.layers[layer].name} has shape {list(self._tables[layer].shape)}, the layer needs "
                f"{list(shape)}. Make the plan for this model."
            )
        return self._tables[layer]

    def record(self, layer: int, top_k: int, token_class: Tensor, pairs: Tensor) -> None:
        """Count the pairs that were computed, and tell the budget, if one is in force."""
        running = modality.running()
        if running is not None and self.stats.recording:
            self.stats.count(layer, top_k, pairs, Tokens(token_class % CLASSES, running.phase))
        if running is not None and running.phase == "prefill" and self._budget is not None:
            self._budget.note(layer, top_k, (pairs >= 0).sum())

    def _find(self, weights: Sequence[Tensor], binding: Binding, region: nn.Module | None) -> int:
        """Look a layer up by its parameters as they are now (offloading replaces them)."""
        found = [
            index
            for index, layer in enumerate(self.layers)
            if any(own is weight for own in layer.experts.parameters() for weight in weights)
        ]
        if len(found) > 1 and region is not None:  # tied weights: an encoder's and a decoder's, say
            inside = {id(module) for module in region.modules()}
            found = [index for index in found if id(self.layers[index].experts) in inside]
        if len(found) == 1:
            if len(self._layer_of) > 8 * len(self.layers):  # forget weights that offloading has replaced
                self._layer_of = {key: known for key, known in self._layer_of.items() if known[0]() is not None}
            self._layer_of[id(weights[0]), id(region)] = (weakref.ref(weights[0]), found[0])
            return found[0]
        if found:
            raise ModelError(
                f"The MoE layers {', '.join(self.layers[index].name for index in found)} share their weights inside one "
                'compiled region, where they cannot be told apart. Use region="moe".'
            )
        raise NotOptimizedError(
            f"The experts' weights {binding.sources[0]} belong to no MoE layer of the optimised model; they were replaced "
            "after optimize(). Call modes_fx.restore(model) and modes_fx.optimize(model) again."
        )

    def _token_classes(self, tokens: int, device: torch.device) -> Tensor:
        running = modality.running()
        if running is None:
            if self.keeps_all:  # nothing depends on the modality then
                return torch.zeros(tokens, dtype=torch.int64, device=device)
            raise ModalityError(
                "An MoE block ran outside a forward of the optimised model, so its tokens' modality is unknown. Call the model "
                "itself, or restore it first."
            )
        return running.flat(tokens, device)
