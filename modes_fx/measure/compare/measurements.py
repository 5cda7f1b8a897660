"""What a plan does to the data: measured once, unless the journal of a comparison knows it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TypedDict

import torch
from torch import nn

from modes_fx.calib.journal import Journal, Key
from modes_fx.calib.objective import Evaluation
from modes_fx.calib.trials import Entry, as_entry, data_hash, from_entry, short_hash, what_determines
from modes_fx.data.batch import Batch
from modes_fx.files import strict_json
from modes_fx.files.strict_json import Number
from modes_fx.measure.compare.samples import SampleObjective, SampleScores
from modes_fx.optimize import set_plan
from modes_fx.plan import SkipPlan


def records_of(
    model: nn.Module, calibration: Sequence[Batch], test: Sequence[Batch], journal: str | os.PathLike[str] | None
) -> Journal:
    """Open the journal of a comparison for the entries of one model and its data; those of others stay beside them.

    Args:
        model: The model.
        calibration: Its batches.
        test: Likewise.
        journal: The file; None keeps entries in memory alone.

    Raises:
        CalibrationError: The file is another command's journal, one of other versions, or cannot be used.
    """
    facts = what_determines(model, data_hash(calibration))
    versions = facts.pop("versions")
    mine = short_hash(json.dumps({**facts, "test": data_hash(test)}, sort_keys=True).encode())
    return Journal(journal, {"command": "compare", "versions": versions}).under(mine)


class SettingsEntry(TypedDict):
    """What speeds are measured in, as a journal keeps it; see ``Stopwatch.facts``."""

    fastest: dict[str, str]
    ours: dict[str, str]
    stock_ms: dict[str, dict[str, Number]]
    ours_times: dict[str, dict[str, Number]]
    failed: dict[str, str]
    batch: int
    prompt_tokens: int
    threads: int


class SpeedEntry(TypedDict):
    """A ``Speed`` as a journal keeps it."""

    times: dict[str, Number]
    ranges: dict[str, tuple[Number, Number]]
    skipped: dict[str, Number]


class _Scores(TypedDict):
    kl_S: list[float]
    tokens_S: list[int]
    flips_S: list[int]
    correct_S: list[bool]
    skip_ratio: dict[str, float]


class Measurements:
    """Measures plans of one keep-rule, which the model is optimised with by the time that one is not known.

    Args:
        model: The model.
        calibration: Data to tune on; see ``Objective``.
        test: Data to measure on.
        layers: MoE layers of the model, L.
        records: Where each measurement is kept.
        objective: What measures.
    """

    def __init__(
        self, model: nn.Module, calibration: Sequence[Batch], test: Sequence[Batch], layers: int, records: Journal,
        objective: type[SampleObjective] = SampleObjective,
    ) -> None:  # fmt: skip
        self._objective = objective
        self._model, self._calibration, self._test = model, calibration, test
        self._layers, self._records = layers, records
        self._tuned_on: SampleObjective | None = None
        self._measured_on: SampleObjective | None = None

    def on_calibration(self, name: str, plan: SkipPlan) -> Evaluation:
        """Return what a contender's plan does to the calibration data."""
        key = ("calibration", plan.rule, name, *identity(plan))
        known = self._records.get(key, Entry)
        if known is not None:
            return from_entry(known)
        if self._tuned_on is None:
            self._tuned_on = self._objective(self._model, self._calibration)
        self._put_tables(plan)
        found = self._tuned_on.evaluate(plan.bounds(self._layers))
        self._records.add(key, as_entry(found))
        return found

    def on_test(self, name: str, plan: SkipPlan | None) -> SampleScores:
        """Return what a contender's plan does to the test data; None: nothing is skipped."""
        key: Key = ("test", "unskipped") if plan is None else ("test", plan.rule, name, *identity(plan))
        known = self._records.get(key, _Scores)
        if known is not None:
            return _scores(known)
        if self._measured_on is None:
            self._measured_on = self._objective(self._model, self._test)
        self._put_tables(plan)
        found = self._measured_on.scores(None if plan is None else plan.bounds(self._layers))
        self._records.add(key, _entry(found))
        return found

    def _put_tables(self, plan: SkipPlan | None) -> None:
        """Contenders of one rule may differ in its tables; bounds are put in force as they are measured."""
        if plan is not None and plan.tables is not None:
            set_plan(self._model, plan)


def identity(plan: SkipPlan) -> Key:
    """Return what tells a plan's first point from every other of its rule and contender."""
    point = plan.points[0]
    whole = short_hash(json.dumps(strict_json.plain([plan.alpha, plan.tables])).encode())
    return point.tau_text, point.tau_vision, point.gamma, whole


def _entry(scores: SampleScores) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in asdict(scores).items()}


def _scores(entry: _Scores) -> SampleScores:
    return SampleScores(
        torch.tensor(entry["kl_S"], dtype=torch.float64),
        torch.tensor(entry["tokens_S"], dtype=torch.int64),
        torch.tensor(entry["flips_S"], dtype=torch.int64),
        torch.tensor(entry["correct_S"], dtype=torch.bool),
        entry["skip_ratio"],
    )
