"""How fast a comparison's rows are: timed once, unless its journal knows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from modes_fx.calib.journal import Journal
from modes_fx.data.batch import Batch
from modes_fx.files import strict_json
from modes_fx.measure.compare.measurements import SettingsEntry, SpeedEntry, identity
from modes_fx.measure.compare.rows import Row
from modes_fx.measure.compare.speed import Stopwatch
from modes_fx.models.device import device_name
from modes_fx.optimize import set_plan
from modes_fx.plan import SkipPlan


class RowSpeeds:
    """Times plans in the fastest settings of stock and of modes-fx, and writes it into their rows.

    Args:
        model: The model, not optimised.
        batch: See ``Stopwatch``.
        records: Where each measurement is kept.
        step: Returns what is called with (done, total) in a part of that name.

    Attributes:
        facts: See ``Stopwatch.facts``.
    """

    def __init__(
        self, model: nn.Module, batch: Batch, records: Journal, step: Callable[[str], Callable[[int, int], None]]
    ) -> None:
        device = next(model.parameters()).device
        self._machine = device.type, device_name(device), torch.get_num_threads()  # what times depend on besides model and data
        self._model, self._records, self._step = model, records, step
        key = ("settings", *self._machine)
        known: Any = records.get(key, SettingsEntry)
        self._stopwatch = Stopwatch(model, batch, known and strict_json.numbers(known), on_step=step("stock settings timed"))
        self.facts = self._stopwatch.facts
        if known is None:
            records.add(key, strict_json.plain(self.facts))

    def write_into(self, rows: dict[str, list[Row]], plans: Sequence[tuple[str, int, SkipPlan]], rule: str) -> None:
        """Time the plans of one keep-rule; the model is left optimised with it.

        Args:
            rows: By contender; those of plans are replaced.
            plans: Contender, index of its row, and plan.
            rule: Name of the keep-rule.
        """
        ours, step = self.facts["ours"], self._step(f"timed: {rule}")
        settings = {setting: [phase for phase in ours if ours[phase] == setting] for setting in ours.values()}
        done, total = 0, len(settings) * len(plans)
        for setting, phases in settings.items():
            compiled = False
            for name, index, plan in plans:
                key = ("speed", setting, *self._machine, plan.rule, name, *identity(plan))
                known: Any = self._records.get(key, SpeedEntry)
                if known is None:
                    if not compiled:
                        self._stopwatch.optimize(self._model, setting, plan)
                        compiled = True
                    set_plan(self._model, plan)
                    known = strict_json.plain(asdict(self._stopwatch(self._model, setting)))
                    self._records.add(key, known)
                rows[name][index] = _with_speed(rows[name][index], strict_json.numbers(known), phases)
                done += 1
                step(done, total)


def _with_speed(row: Row, found: Mapping[str, Any], phases: Sequence[str]) -> Row:
    """Return a row with what a ``Speed`` says of some phases."""
    skipped = {phase: found["skipped"][phase] for phase in phases if found["skipped"][phase] == found["skipped"][phase]}
    return replace(
        row,
        skipped={**row.skipped, **skipped},
        speed={**row.speed, **{phase: found["times"][phase] for phase in phases}},
        speed_range={**row.speed_range, **{phase: tuple(found["ranges"][phase]) for phase in phases}},
    )
