"""A comparison that was cut off goes on where it stopped, and ends as if it had not been."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modes_fx.calib.objective import Objective
from modes_fx.errors import CalibrationError
from modes_fx.measure import twins
from modes_fx.measure.compare import Comparison, compare, speed
from modes_fx.measure.compare.samples import SampleObjective
from tests import tiny
from tests.calib.conftest import with_answers

pytestmark = pytest.mark.usefixtures("without_inductor")
CALIBRATION, TEST = [with_answers(1), with_answers(2)], [with_answers(4)]
RULES = ("naee", "modes")


class CutOffError(Exception):
    pass


def noting(method: Callable[[Any, Any], Any], seen: list[str]) -> Callable[[Any, Any], Any]:
    def noted(self: Any, *given: Any) -> Any:
        found = method(self, *given)
        seen.append(method.__name__)
        return found

    return noted


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was measured, in order."""
    seen: list[str] = []
    for owner, name in ((Objective, "evaluate"), (SampleObjective, "scores"), (speed.Stopwatch, "__call__")):
        monkeypatch.setattr(owner, name, noting(getattr(owner, name), seen))
    return seen


def run(model: nn.Module, **options: Any) -> Comparison:
    return compare(model, CALIBRATION, TEST, (0.5, 0.75), RULES, grid_size=3, tolerance=0.04, **options)


@pytest.mark.slow
def test_nothing_that_was_measured_is_measured_again(vlm: nn.Module, tmp_path: Path, measured: list[str]) -> None:
    whole = run(vlm)
    needed = sorted(measured)
    journal, parts = tmp_path / "journal.jsonl", set()

    def cut_off(part: str, done: int, total: int | None) -> None:
        if (part, done) not in parts:
            parts.add((part, done))
            if done and len(parts) % 5 == 0:
                raise CutOffError

    measured.clear()
    attempts = 0
    found = None
    while found is None:
        attempts += 1
        try:
            found = run(vlm, journal=journal, progress=cut_off)
        except CutOffError:
            assert not hasattr(vlm, "_modes_fx")  # restored
    assert attempts > 3
    assert sorted(measured) == needed
    assert found == whole

    measured.clear()
    assert run(vlm, journal=journal) == whole
    assert measured == []


def test_speeds_are_kept_with_their_bar(
    vlm: nn.Module, tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NEW_TOKENS": 2, "ROUNDS": 1, "WARM_UP": 0}.items():
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setattr(twins, "STOCK_SETTINGS", (twins.Setting("eager"),))
    monkeypatch.setattr(twins, "OUR_SETTINGS", (twins.Setting(twins.OURS, "moe"),))
    options: dict[str, Any] = {"targets": (0.5,), "rules": ("threshold",), "timed": True, "journal": tmp_path / "journal.jsonl"}
    first = compare(vlm, CALIBRATION, TEST, **options)
    assert first.timing["fastest"] == {"prefill": "eager", "decode": "eager"}
    assert first.timing["ours"] == {"prefill": "modes-fx", "decode": "modes-fx"}
    assert measured.count("__call__") == 2  # with nothing skipped, and under the row's plan
    (row,) = first.rows
    assert row.speed.keys() == row.speed_range.keys() == {"prefill", "decode"}
    assert row.skipped["prefill"] != row.skipped["all"]  # of the prompts that were timed, not of all test data
    again = compare(vlm, CALIBRATION, TEST, **options)
    assert measured.count("__call__") == 2
    assert asdict(again) == asdict(first)


def test_models_and_data_share_a_journal_and_each_finds_its_own(vlm: nn.Module, tmp_path: Path, measured: list[str]) -> None:
    options: dict[str, Any] = {"targets": (0.5,), "rules": ("threshold",), "journal": tmp_path / "journal.jsonl"}
    first = compare(vlm, CALIBRATION, TEST, **options)
    other = tiny.make()
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    assert compare(other, CALIBRATION, TEST, **options) != first
    assert compare(vlm, CALIBRATION, CALIBRATION, **options) != first
    measured.clear()
    assert compare(vlm, CALIBRATION, TEST, **options) == first
    assert measured == []


def test_a_journal_of_another_command_is_refused(vlm: nn.Module, tmp_path: Path) -> None:
    from modes_fx.calib.importance_journal import resumable_importance

    journal = tmp_path / "journal.jsonl"
    resumable_importance(vlm, CALIBRATION, journal=journal)
    with pytest.raises(CalibrationError, match="belongs to another run: command was None and is 'compare'"):
        run(vlm, journal=journal)
