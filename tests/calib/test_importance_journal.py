"""Importance in parts, cut off and resumed, against importance at once."""

from pathlib import Path

import pytest
from torch import nn

from modes_fx.calib import layer_importance
from modes_fx.calib.importance_journal import resumable_importance
from modes_fx.errors import CalibrationError
from tests.calib.conftest import Batch, with_answers


class CutOffError(Exception):
    pass


@pytest.mark.parametrize("mode", ["reference", "paper"])
def test_a_run_that_was_cut_off_measures_only_what_is_missing(model: nn.Module, tmp_path: Path, mode: str) -> None:
    batches: list[Batch] = [with_answers(seed) for seed in range(3)]
    journal = tmp_path / "journal.jsonl"
    steps: list[tuple[int, int]] = []

    def cut_off(done: int, total: int) -> None:
        steps.append((done, total))
        if done > total / 2:
            raise CutOffError

    with pytest.raises(CutOffError):
        resumable_importance(model, batches, mode, journal=journal, on_step=cut_off)
    assert len(journal.read_text().splitlines()) == 2  # the header and the first of three parts
    assert steps == [(done, steps[0][1]) for done in range(1, len(steps) + 1)]

    measured: list[tuple[int, int]] = []
    resumed = resumable_importance(model, batches, mode, journal=journal, on_step=lambda *step: measured.append(step))
    assert 3 * len(measured) == 2 * steps[0][1]
    at_once = layer_importance(model, batches, mode)
    assert resumed.answer_tokens == at_once.answer_tokens
    assert (resumed.mode, resumed.method) == (at_once.mode, at_once.method)
    for name in ("kl", "alpha"):
        for found, wanted in zip(getattr(resumed, name), getattr(at_once, name), strict=True):
            assert found == pytest.approx(wanted, rel=1e-5, abs=1e-12)


def test_without_data_there_is_nothing_to_resume(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="at least one batch"):
        resumable_importance(model, [], journal=tmp_path / "journal.jsonl")


def test_a_journal_of_other_data_is_refused(model: nn.Module, batches: list[Batch], tmp_path: Path) -> None:
    resumable_importance(model, batches[:1], "paper", journal=tmp_path / "journal.jsonl")
    with pytest.raises(CalibrationError, match="data was"):
        resumable_importance(model, batches, "paper", journal=tmp_path / "journal.jsonl")
