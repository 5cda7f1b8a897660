"""Which thresholds are in force: one object, swapped as a whole, so that a forward that reads it once sees one plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modes_fx.modality import CLASSES, PADDING
from modes_fx.plan.budget import Budget
from modes_fx.policies import Rule
from modes_fx.report import PHASES


@dataclass(frozen=True)
class InForce:
    """Bounds of every layer, as tensors of their own: casting or loading a model does not touch them.

    Attributes:
        bounds: float32 [phases (prefill, decode), L, classes].
        tables: float32, the rule's table of each layer; () for a rule without.
        budget: What sets the bounds of prefills as they go; None where ``bounds`` holds.
        keeps_all: Whether no pair can be dropped, so that nothing depends on the modality.
        rows: ``bounds`` of each phase and layer, on a CPU: no views, whose base's sizes dynamo would look at in each call. ()
            elsewhere, where a forward has a copy of ``bounds``, of which it uses each row but once.
    """

    bounds: Tensor
    tables: tuple[Tensor, ...] = ()
    budget: Budget | None = None
    keeps_all: bool = True
    rows: tuple[tuple[Tensor, ...], ...] = ()

    @classmethod
    def of(
        cls, rule: Rule, num_layers: int, given: Tensor | Budget | None, tables: Sequence[Tensor], device: torch.device
    ) -> InForce:
        """Make what holds from bounds as ``Runtime.set_bounds`` takes them, on a device."""
        with torch.inference_mode(False):
            fixed = given.fixed if isinstance(given, Budget) else given
            shape = len(PHASES), num_layers, CLASSES * (2 if rule.protects else 1)
            bounds = torch.full(shape, rule.keep_all, device="cpu")
            bounds[..., PADDING::CLASSES] = rule.skip_all
            if fixed is not None:
                bounds[..., :PADDING] = fixed
            if rule.decode_only:
                bounds[PHASES.index("prefill"), :, :PADDING] = rule.keep_all
            bounds = bounds.to(device)
            budget = given.to(device) if isinstance(given, Budget) else None
            rows = _rows(bounds) if device.type == "cpu" else ()
            return cls(bounds, tuple(table.to(device) for table in tables), budget, given is None, rows)

    def holding(self, other: InForce) -> InForce:
        """Return what another one says, in the memory of this one, where captured CUDA graphs read it; on the same device."""
        with torch.inference_mode(False):
            for mine, theirs in zip((self.bounds, *self.tables), (other.bounds, *other.tables), strict=True):
                mine.copy_(theirs)
        return replace(other, bounds=self.bounds, tables=self.tables)

    def marked_static(self) -> InForce:
        """Tell dynamo that the tensors stay where they are: CUDA graphs then read them instead of copying them in."""
        for tensor in (self.bounds, *self.tables):
            torch._dynamo.mark_static_address(tensor)
        return self

    def snapshot(self) -> InForce:
        """Return what nobody changes while a forward runs: on a CPU it never is changed, elsewhere it is copied."""
        return self if self.bounds.device.type == "cpu" else self.copied()

    def copied(self) -> InForce:
        """Return the same in memory of its own."""
        return InForce(self.bounds.clone(), tuple(table.clone() for table in self.tables), self.budget, self.keeps_all)


def _rows(bounds: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    return tuple(tuple(row.clone() for row in phase) for phase in bounds)
