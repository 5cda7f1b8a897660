"""What all parts of one optimised model share: its layers, the thresholds in force, the counts, and how each site ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from modes_fx.errors import ModalityError, PlanError
from modes_fx.graph.in_force import InForce
from modes_fx.graph.running import RUNNING, Forward
from modes_fx.passes.site import SiteRecord
from modes_fx.passes.skip_experts import Dispatch
from modes_fx.plan.budget import Budget
from modes_fx.policies import RULES, key_of
from modes_fx.report import SkipStats


class Layer(Protocol):
    """What is known of an MoE layer while it runs."""

    @property
    def name(self) -> str:
        """Its module path."""

    @property
    def num_experts(self) -> int:
        """E; 0 where its experts' form is unknown."""

    @property
    def hidden_size(self) -> int:
        """Width of the rows that the experts take, H."""


class Runtime:
    """The run-time side of one optimised model.

    Args:
        layers: The model's MoE layers.
        rule: Name of the keep-rule that its graphs hold.
        dispatch: How kept pairs are computed; see ``passes.skip_experts``.

    Attributes:
        layers: The model's MoE layers.
        in_force: The thresholds; a forward reads it once.
        sites: How the routing site of each layer ended, by its index, as far as it was traced.
        graphs: How many graphs its regions have compiled.
        suspended: Whether experts run the stock dispatch, uncompiled and with all pairs.
        switched: Whether somebody chose another dispatch for the experts since, so that they run as stock.
    """

    def __init__(self, layers: Sequence[Layer], rule: str, dispatch: Dispatch) -> None:
        self.layers = layers
        self.rule, self.rule_key = RULES[rule], key_of(rule)
        self.dispatch: Dispatch = dispatch
        self.stats = SkipStats(tuple(layer.name for layer in layers))
        self.sites: dict[int, SiteRecord] = {}
        self.graphs = 0
        self.suspended = self.switched = False
        self.in_force: InForce
        self._given: Tensor | Budget | None = None
        self._tables: tuple[Tensor, ...] = ()
        self._put(torch.device("cpu"))

    @property
    def bounds_in_force(self) -> Tensor | Budget | None:
        """What ``set_bounds`` was given last."""
        return self._given.clone() if isinstance(self._given, Tensor) else self._given

    def set_bounds(self, bounds: Tensor | Budget | None, tables: Sequence[Tensor] | None = None) -> None:
        """Put new bounds in force, for forwards that begin from now on; compiles nothing.

        Args:
            bounds: float32 [L, 2] for (text, vision), or [2, L, 2] where (prefill, decode) have bounds of their own; or what
                sets them as it goes. None keeps all pairs.
            tables: The rule's table of each layer, float32; None leaves those that there are.

        Raises:
            PlanError: A table has another shape than its layer needs.
        """
        if tables is not None:
            self._check_tables(tables)
            self._tables = tuple(tables)
        self._given = bounds.clone() if isinstance(bounds, Tensor) else bounds
        self._put(self.in_force.bounds.device)

    def follow(self, device: torch.device) -> None:
        """Hold what is in force on the device of the model's inputs; not on meta, which would lose it."""
        if self.in_force.bounds.device != device and device.type != "meta":
            self.stats.follow(device)
            self._put(device)

    def given(self, layer: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what a layer's marker takes, for the running forward; see ``Forward.given``.

        Raises:
            ModalityError: No forward of this model runs, so that the tokens' modality is unknown.
        """
        forward = self.running()
        if forward is not None:
            return forward.given(layer, tokens, device)
        plan = self.in_force
        if not plan.keeps_all:
            raise ModalityError(
                "An MoE block ran outside a forward of the optimised model, so its tokens' modality is unknown. Call the model "
                "itself, or restore it first."
            )
        classes = torch.zeros(tokens, dtype=torch.int64, device=device)
        table = plan.tables[layer].to(device) if plan.tables else None
        return classes, plan.bounds[0, layer].to(device), table

    def running(self) -> Forward | None:
        """Return the forward of this model that runs in this thread, if one does."""
        forward = RUNNING.forward
        return forward if forward is not None and forward.runtime is self else None

    def empty_table(self, layer: Layer) -> Tensor | None:
        """Return a table of zeros for a layer; None if the rule has none."""
        return torch.zeros(self.rule.table_shape(layer.num_experts), device="cpu") if self.rule.has_table else None

    def _put(self, device: torch.device) -> None:
        tables = self._tables or tuple(table for layer in self.layers if (table := self.empty_table(layer)) is not None)
        new = InForce.of(self.rule, len(self.layers), self._given, tables, device)
        if device.type == "cpu":
            self.in_force = new
        elif self.in_force.bounds.device == device:
            self.in_force = self.in_force.holding(new)
        else:
            self.in_force = new.marked_static()

    def _check_tables(self, tables: Sequence[Tensor]) -> None:
        for layer, table in zip(self.layers, tables, strict=True):
            shape = self.rule.table_shape(layer.num_experts)
            if layer.num_experts and tuple(table.shape) != shape:
                raise PlanError(
                    f"The plan's table for {layer.name} has shape {list(table.shape)}, the layer needs {list(shape)}. Make the "
                    "plan for this model."
                )
