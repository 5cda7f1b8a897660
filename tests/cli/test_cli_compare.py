"""``compare`` as a user types it, on the embedded model."""

import csv
import json
import math
from pathlib import Path

import pytest

from modes_fx.cli import compare
from modes_fx.demo import CHECKPOINT, make_samples
from modes_fx.errors import CalibrationError, ModelError
from modes_fx.measure.compare import CONTENDERS, Comparison, Row
from modes_fx.measure.compare.rows import short_names
from modes_fx.modality import Phase
from tests.cli.command import run
from tests.measure.page.reading import read

pytestmark = pytest.mark.usefixtures("without_inductor")
SMALL = ("--grid-size", "3", "--targets", "0.5", "0.9", "--rules", "naee_top2", "threshold", "--batch-size", "8")


@pytest.fixture(autouse=True)
def _little_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modes_fx.cli.shared._DEMO_IMAGES", {"calibration": 1, "test": 1})
    monkeypatch.setattr("modes_fx.measure.page.closeup.choose", lambda samples: samples[:2])
    monkeypatch.setenv("COLUMNS", "120")


@pytest.mark.wide
def test_two_models_make_a_table_of_means_and_three_files(tmp_path: Path) -> None:
    result = run("compare", "demo", CHECKPOINT, "--out", tmp_path, *SMALL)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    for wanted in (
        "8 samples",
        "over 2 models, Student's t",
        "NAEE",
        "threshold",
    ):  # the table's cells wrap with the terminal's width
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


@pytest.mark.wide
def test_decode_steps_have_a_table_of_experts(tmp_path: Path) -> None:
    rules = ("--rules", "oea", "--rules", "threshold", "--targets", "0.4")
    result = run("compare", "demo", "--phase", "decode", "--batch-size", "8", *rules, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    for wanted in ("unread", "pairs", "OEA", "experts that decode steps leave"):
        assert wanted in result.output
    facts = json.loads((tmp_path / "compare.json").read_text())
    assert facts["settings"]["phase"] == "decode"
    for row in facts["rows"]:
        assert row["skipped"]["calibration"] >= 0.4
        assert 0 < row["skipped"]["decode"] < 1
        assert row["metrics"]["kl"] > 0


def test_data_is_asked_for_and_one_architecture(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="--data to tune on and --test-data"):
        run("compare", CHECKPOINT, "--out", tmp_path)
    with pytest.raises(ModelError, match="demo, demo: a model is given twice"):
        run("compare", "demo", "demo", "--out", tmp_path, *SMALL)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((CHECKPOINT / "config.json").read_text().replace('"rope_theta": ', '"rope_theta": 1'))
    with pytest.raises(ModelError, match="other is of another architecture than demo"):  # found by configs: it has no weights
        run("compare", "demo", other, "--out", tmp_path, *SMALL)
    with pytest.raises(ModelError, match="nowhere"):
        run("compare", "demo", tmp_path / "nowhere", "--out", tmp_path, *SMALL)
    assert not (tmp_path / "compare.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--phase", "decode", "--speed"), "compare decode steps without them"),
        (("--phase", "decode", "--rules", "mc_moe"), "mc_moe: nothing to compare in decode"),
        (("--rules", "oea"), "oea: nothing to compare in prefill"),
    ],
)
def test_what_a_phase_cannot_be_asked_is_said_before_a_model_is_loaded(
    options: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare.shared, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(CalibrationError, match=said):
        run("compare", "demo", "--out", tmp_path, *options)


def test_a_page_that_cannot_be_made_costs_nothing_that_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no such [/colour]")

    monkeypatch.setattr("modes_fx.measure.compare.output.write_comparison_page", broken)
    monkeypatch.setattr("modes_fx.measure.page.closeup.look_closely", broken)
    command = ("compare", "demo", "--out", tmp_path, "--rules", "naee_top2", "--targets", "5e-1", "--samples", "3")
    with pytest.raises(ValueError, match="no such"):
        run(*command, "--test-samples", "5")
    facts = json.loads((tmp_path / "compare.json").read_text())
    assert [model["samples"] for model in facts["models"].values()] == [5]
    assert (tmp_path / "compare.csv").exists()


def test_names_are_as_short_as_tells_models_apart() -> None:
    assert short_names(["demo", "out/seed1"]) == {"demo": "demo", "out/seed1": "seed1"}
    found = short_names(["runs/0/checkpoint", "runs/1/checkpoint", "org/model"])
    assert list(found.values()) == ["0/checkpoint", "1/checkpoint", "org/model"]


def test_what_was_timed_has_a_table_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    ranges = {"prefill": (1.5, 1.8), "decode": (math.nan, math.nan)}
    speed = {"prefill": 1.7, "decode": math.nan}
    timed = Row("naee", "NAEE", 0.5, "reached", 1.0, {"prefill": 0.51, "decode": 0.62}, speed=speed, speed_range=ranges)
    ms = {"prefill": 20.0, "decode": 3.0}
    timing = {
        "fastest": dict.fromkeys(speed, "eager"), "stock_ms": {"eager": ms}, "ours": dict.fromkeys(speed, "modes-fx"),
        "ours_times": {"modes-fx": {"prefill": 0.9, "decode": 1.1}},
    }  # fmt: skip
    compare._print_speed([timed], {"folder/seed1": Comparison({}, 8, (timed,), timing)})
    said = " ".join(capsys.readouterr().out.split())
    assert "NAEE 50.0% 1.70x (1.50 1.80) 51.0% not told 62.0%" in said
    assert "seed1: prefill eager, 20.0 ms; decode eager, 3.0 ms a token" in said
    assert "nothing skipped: prefill modes-fx, 0.90x; decode modes-fx, 1.10x." in said


def test_the_parts_of_the_method_have_a_table_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        Row(rule, CONTENDERS[rule].title, target, "reached", 1.0, metrics={"kl": kl})
        for rule, kl in (("naee", 0.5), ("threshold", 0.25), ("tempered", 0.125))
        for target in (0.5, 0.75)
    ]
    compare._print_ablation(rows)
    said = " ".join(capsys.readouterr().out.split())
    assert "threshold only 1 one 2.5e-01 2.5e-01 tempered alpha^gamma text, vision 1.2e-01 1.2e-01" in said
    assert "NAEE" not in said
    compare._print_ablation(rows[:4])
    assert capsys.readouterr().out == ""


@pytest.mark.wide
def test_data_in_files_and_a_journal(tmp_path: Path) -> None:
    folders = {part: question_folder(tmp_path / part, part) for part in ("calibration", "test")}
    command = (
        "compare", CHECKPOINT, "--data", folders["calibration"], "--test-data", folders["test"] / "data.jsonl",
        "--samples", 6, "--test-samples", 5, "--targets", "0.5", "--rules", "naee_top2", "--batch-size", "3",
        "--journal", tmp_path / "journal.jsonl", "--out",
    )  # fmt: skip
    result = run(*command, tmp_path / "first")
    assert result.exit_code == 0, result.output
    assert "6 samples of 6 chosen from 8" in result.output
    assert "Test data, 5 samples" in result.output
    facts = json.loads((tmp_path / "first" / "compare.json").read_text())
    (row,) = facts["rows"]
    assert row["status"] == "reached"
    assert row["skipped"]["vision"] > 0
    assert row["metrics"]["kl"] > 0
    lines = (tmp_path / "journal.jsonl").read_bytes()
    run(*command, tmp_path / "again")
    assert (tmp_path / "again" / "compare.json").read_bytes() == (tmp_path / "first" / "compare.json").read_bytes()
    assert (tmp_path / "journal.jsonl").read_bytes() == lines


def question_folder(folder: Path, part: str) -> Path:
    folder.mkdir()
    rows = []
    for index, sample in enumerate(make_samples(part, 1)):
        sample.image.save(folder / f"{index}.png")
        rows.append(json.dumps({"image": f"{index}.png", "question": sample.question, "answer": sample.answer}))
    (folder / "data.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def test_the_phases_that_the_command_knows_without_torch_are_all() -> None:
    assert Phase == compare._PHASES
