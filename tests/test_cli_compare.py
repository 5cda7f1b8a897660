"""``compare`` as a user types it, on the embedded model."""

import csv
import json
from pathlib import Path

import pytest

from modes_fx.cli import compare
from modes_fx.compare import Row
from modes_fx.demo import CHECKPOINT
from modes_fx.errors import CalibrationError, ModelError
from tests.page.reading import read
from tests.test_cli_calibrate import run

pytestmark = pytest.mark.usefixtures("without_inductor")
SMALL = ("--grid-size", "3", "--targets", "0.5", "0.9", "--rules", "naee_top2", "threshold", "--batch-size", "8")


@pytest.fixture(autouse=True)
def _little_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_DEMO_DATA", {"calibration": 1, "test": 1})
    monkeypatch.setattr("modes_fx.page.closeup.choose", lambda samples: samples[:2])
    monkeypatch.setenv("COLUMNS", "120")


def test_two_models_make_a_table_of_means_and_three_files(tmp_path: Path) -> None:
    result = run("compare", "demo", CHECKPOINT, "--out", tmp_path, *SMALL)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    for wanted in ("8 samples", "of 2 models", "NAEE", "threshold"):  # the table's cells wrap with the terminal's width
        assert wanted in said
    page = read(tmp_path / "compare.html")
    assert f"mean of 2 models (demo, {CHECKPOINT.name})" in page.whole
    assert page.text.count("unskipped") == 2 + 1  # a card a sample, and the level that rules are held against
    assert "threshold only at 90% of demo" in page.whole
    facts = json.loads((tmp_path / "compare.json").read_text())
    assert [(row["rule"], row["target"], row["models"]) for row in facts["rows"]] == [
        ("naee_top2", 0.5, 2), ("naee_top2", 0.9, 2), ("threshold", 0.5, 2), ("threshold", 0.9, 2),
    ]  # fmt: skip
    assert (facts["rows"][1]["status"], facts["rows"][1]["largest"]) == ("unreachable", 0.875)
    first, second = facts["models"].values()
    assert first == second  # the same weights: all of it is deterministic
    low, high = facts["rows"][0]["intervals"]["kl"]
    assert low == high == facts["rows"][0]["metrics"]["kl"]
    lines = list(csv.DictReader((tmp_path / "compare.csv").read_text().splitlines()))
    assert [line["model"] for line in lines] == ["demo"] * 4 + [str(CHECKPOINT)] * 4 + ["mean"] * 4
    assert float(lines[0]["metrics_kl"]) == facts["models"]["demo"]["rows"][0]["metrics"]["kl"]


def test_data_is_asked_for_and_one_architecture(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="--data to tune on and --test-data"):
        run("compare", CHECKPOINT, "--out", tmp_path)
    with pytest.raises(ModelError, match="demo, demo: a model is given twice"):
        run("compare", "demo", "demo", "--out", tmp_path, *SMALL)
    assert not (tmp_path / "compare.json").exists()


def test_what_was_timed_has_a_table_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    timed = Row("naee", "NAEE", 0.5, "reached", 1.0, {"prefill": 0.51, "decode": 0.62}, speed={"prefill": 1.7, "decode": 1.2})
    compare._print_speed([timed])
    assert "NAEE 50.0% 1.70x 51.0% 1.20x 62.0%" in " ".join(capsys.readouterr().out.split())
