"""``calibrate`` and ``search`` as a user types them, on the embedded model and data in files."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from modes_fx.calib.importance_file import ImportanceFile
from modes_fx.calib.plainest import Worse
from modes_fx.cli.search import say_worse, seconds
from modes_fx.demo import CHECKPOINT, make_samples
from modes_fx.errors import CalibrationError, ModelError
from modes_fx.files import signed_json
from modes_fx.plan import SkipPlan
from tests import harness, tiny
from tests.cli.command import run

SMALL = ("--batch-size", "3", "--samples", "7")
SEARCH = ("--targets", "0.5", "0.75", "--gammas", "0.5", "--grid-size", "4", "--hold-back", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, calibrated and searched once."""
    folder = tmp_path_factory.mktemp("cli")
    rows = []
    for index, sample in enumerate(make_samples("calibration", 1)):
        sample.image.save(folder / f"{index}.png")
        rows.append(json.dumps({"image": f"{index}.png", "question": sample.question, "answer": sample.answer}))
    (folder / "data.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        harness.compile_with(patch, harness.uncompiled)
        journal = ("--journal", folder / "importance.jsonl")
        calibrated = run(
            "calibrate", CHECKPOINT, "--data", folder / "data.jsonl", "--out", folder / "alpha.json", *SMALL, *journal
        )
        assert calibrated.exit_code == 0, calibrated.output
        (folder / "calibrate.txt").write_text(calibrated.output)
        searched = run("search", CHECKPOINT, *files(folder, "plan.json"), *SMALL, *SEARCH, "--held-out", folder / "data.jsonl")
        assert searched.exit_code == 0, searched.output
        (folder / "search.txt").write_text(searched.output)
    return folder


def files(folder: Path, out: str) -> tuple[object, ...]:
    return ("--data", folder / "data.jsonl", "--importance", folder / "alpha.json", "--out", folder / out)


def test_calibrate_writes_the_importance_of_every_layer(folder: Path) -> None:
    file = ImportanceFile.load(folder / "alpha.json")
    assert len(file.importance.alpha) == len(file.layers) == 8
    for column in zip(*file.importance.alpha, strict=True):
        assert sum(column) == pytest.approx(1)
    shown = (folder / "calibrate.txt").read_text()
    assert "7 samples of 7 chosen from 8" in shown
    assert f"{file.importance.kl[0][0]:.2e}" in shown


def test_search_writes_a_plan_that_meets_its_targets(folder: Path) -> None:
    plan = SkipPlan.load(folder / "plan.json")
    assert plan.targets == (0.5, 0.75)
    for target in plan.targets:
        point = plan.point(target)
        assert point.realised["calibration"] >= target
        assert point.realised["held_out"] == point.realised["calibration"]  # the same data
        assert point.kl["held_out"] == point.kl["calibration"]
        assert point.gamma == 0.5
    assert plan.alpha == ImportanceFile.load(folder / "alpha.json").importance.alpha
    assert plan.provenance["seed"] == 0
    assert plan.provenance["command"][0] == "modes-fx"
    assert plan.target_range is not None
    assert len(plan.weights) == 8
    shown = " ".join((folder / "search.txt").read_text().split())
    assert f"{plan.point(0.5).kl['calibration']:.2e}" in shown
    assert f"{plan.provenance['search']['evaluations']} evaluations (0 from the journal)" in shown


def test_a_target_that_loses_more_than_the_plainest_rule_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    say_worse([Worse(target=0.875, kl=0.13, ratio=0.906, k=1, kl_of_k=0.007)])
    said = " ".join(capsys.readouterr().out.split())
    assert "Target 0.875 is worse than the plainest rule" in said
    assert "skips 90.6% at a KL of 1.3e-01, where keeping each token's 1 largest weights costs 7.0e-03" in said
    assert "more --samples or a larger --grid-size" in said


@pytest.mark.usefixtures("without_inductor")
def test_the_importance_of_a_journal_is_the_same_and_is_not_measured_again(folder: Path) -> None:
    first = ImportanceFile.load(folder / "alpha.json")
    lines = (folder / "importance.jsonl").read_bytes()
    command = ("calibrate", CHECKPOINT, "--data", folder / "data.jsonl", "--out", folder / "again.json", *SMALL)
    run(*command, "--journal", folder / "importance.jsonl")
    again = ImportanceFile.load(folder / "again.json")
    assert (again.importance.alpha, again.data_hash) == (first.importance.alpha, first.data_hash)
    assert (folder / "importance.jsonl").read_bytes() == lines
    with pytest.raises(CalibrationError, match="belongs to another run: data was"):
        run(*command, "--seed", 1, "--journal", folder / "importance.jsonl")


@pytest.mark.usefixtures("without_inductor")
def test_a_time_budget_that_is_too_short_says_so_and_a_long_one_does_not_matter(folder: Path) -> None:
    journal = ("--journal", folder / "search.jsonl")
    with pytest.raises(CalibrationError, match=r"time budget of 0\.001 s was over after 0 evaluations"):
        run("search", CHECKPOINT, *files(folder, "none.json"), *SMALL, *SEARCH, *journal, "--time-budget", "0.001")
    assert not (folder / "none.json").exists()
    run("search", CHECKPOINT, *files(folder, "whole.json"), *SMALL, *SEARCH, *journal, "--time-budget", "2h")
    whole, unlimited = SkipPlan.load(folder / "whole.json"), SkipPlan.load(folder / "plan.json")
    assert whole.provenance["search"]["complete"]
    for target in unlimited.targets:
        assert whole.point(target).kl["calibration"] == unlimited.point(target).kl["calibration"]


@pytest.mark.slow
def test_two_launched_processes_write_the_plan_of_one(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(2):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.calib.worker", "command", "search", CHECKPOINT, *files(folder, "two.json")]
        started.append(
            subprocess.Popen(
                [*map(str, command), *SMALL, *SEARCH], cwd=Path(__file__).parents[1], env=environment,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    said = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert "shared by 2 processes" in " ".join(said[0][0].split())
    assert said[1][0] == ""
    one, two = SkipPlan.load(folder / "plan.json"), SkipPlan.load(folder / "two.json")
    assert two.provenance["data_hash"] == one.provenance["data_hash"]
    for target in one.targets:
        assert vars(two.point(target)) | {"kl": 0, "realised": 0} == vars(one.point(target)) | {"kl": 0, "realised": 0}
        assert two.point(target).kl["calibration"] == pytest.approx(one.point(target).kl["calibration"], rel=1e-6)


@pytest.mark.parametrize(("text", "value"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400)])
def test_a_time_is_read_with_its_unit(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["soon", "10d", "-1", "0", "0m"])
def test_what_is_no_time_is_refused(text: str) -> None:
    assert run("search", "model", "--data", "d", "--time-budget", text).exit_code == 2


def test_an_importance_of_another_model_is_refused_with_both_named(folder: Path) -> None:
    file = ImportanceFile.load(folder / "alpha.json")
    with pytest.raises(CalibrationError, match="measured on another model: qwen3_vl_moe with config"):
        file.check_model(tiny.make("olmoe"))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "Cannot read the importance"),
        ("{", "not a whole JSON file"),
        ("[" * 10**5, "not a whole JSON file"),
        ('{"schema_version": 1}', "not an importance of version 2"),
        ('{"importance_version": true}', "not an importance of version 2"),
        ('{"importance_version": 1}', "not a whole importance"),
        ('{"importance_version": 2, "digest": "0"}', "digest does not fit"),
        ('{"importance_version": 1, "importance": {"alpha": 3}}', "not a whole importance"),
    ],
)
def test_a_file_that_is_no_importance_says_how_to_make_one(tmp_path: Path, content: str | None, match: str) -> None:
    path = tmp_path / "alpha.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CalibrationError, match=f"(?s){match}.*modes-fx calibrate"):
        ImportanceFile.load(path)


@pytest.mark.parametrize(
    ("model", "options", "match"),
    [
        ("no/such/folder/here", (), "There is no file or folder no/such/folder/here"),
        (CHECKPOINT, ("--dtype", "float5"), "Unknown dtype 'float5'"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_named(
    folder: Path, model: object, options: tuple[str, ...], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=match):
        run("search", model, *files(folder, "none.json"), *options)
    assert not (folder / "none.json").exists()


@pytest.mark.parametrize("command", ["calibrate", "search"])
def test_an_output_that_cannot_be_written_is_refused_before_any_work(folder: Path, command: str) -> None:
    result = run(command, CHECKPOINT, "--data", folder / "nothing", "--out", folder)
    assert result.exit_code == 2
    assert result.output.split("directory")[0].rstrip(" │\n").endswith("is a")  # wrapped in a box as wide as the terminal


@pytest.mark.parametrize("command", ["calibrate", "search", "compare"])
def test_an_output_below_a_file_is_refused_before_any_work(folder: Path, command: str) -> None:
    result = run(command, CHECKPOINT, "--data", folder / "nothing", "--out", folder / "data.jsonl" / "new" / "out")
    assert result.exit_code == 2
    assert "cannot be written" in " ".join(result.output.replace("│", " ").split())


def test_the_user_sets_the_share_of_bad_samples(folder: Path, tmp_path: Path) -> None:
    rows = (folder / "data.jsonl").read_text().splitlines()[:3]
    (tmp_path / "data.jsonl").write_text("\n".join([*rows, '{"image": "none.png", "question": "q", "answer": "a"}']) + "\n")
    for image in folder.glob("*.png"):
        (tmp_path / image.name).write_bytes(image.read_bytes())
    with pytest.raises(CalibrationError, match=r"--max-bad.* than 0\.2"):
        run("calibrate", CHECKPOINT, "--data", tmp_path, "--max-bad", "0.2", "--out", tmp_path / "importance.json")
    with pytest.raises(CalibrationError, match="Unknown method"):  # the data are taken: the next thing is refused
        run("calibrate", CHECKPOINT, "--data", tmp_path, "--max-bad", "0.3", "--method", "none", "--out", tmp_path / "i.json")


@pytest.mark.usefixtures("without_inductor")
def test_the_demo_brings_its_own_data_and_no_other_model_does(tmp_path: Path) -> None:
    small = ("--samples", "5", "--batch-size", "5", "--method", "estimate", "--out", tmp_path / "importance.json")
    assert "5 samples of 5 chosen from 96 in demo (built in)" in run("calibrate", "demo", *small).output
    assert len(ImportanceFile.load(tmp_path / "importance.json").layers) == 8
    with pytest.raises(CalibrationError, match=r"No data for .*checkpoint: pass --data"):
        run("calibrate", CHECKPOINT, *small)
    with pytest.raises(CalibrationError, match="No data for org/model"):
        run("search", "org/model")
    for option in ("--split", "--data-format"):
        with pytest.raises(CalibrationError, match=f"{option} would be ignored"):
            run("calibrate", "demo", *small, option, "gqa")


def test_an_importance_that_was_damaged_is_refused_and_an_old_one_warned_of(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, content = tmp_path / "importance.json", json.loads((folder / "alpha.json").read_text())
    content["importance"]["kl"][0][0] += 1e-9
    path.write_text(json.dumps(content))
    with pytest.raises(CalibrationError, match=r"importance\.json is not as it was written"):
        ImportanceFile.load(path)
    content = {**content, "importance_version": 1}
    del content["digest"]
    path.write_text(json.dumps(content))
    assert ImportanceFile.load(path).layers == ImportanceFile.load(folder / "alpha.json").layers
    assert ["has no digest" in record.getMessage() for record in caplog.records] == [True]


def test_an_importance_of_impossible_numbers_is_refused(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "alpha.json").read_text())
    content["importance"]["alpha"][0][0] = -0.5
    (tmp_path / "importance.json").write_text(json.dumps(signed_json.signed(content)))
    with pytest.raises(CalibrationError, match=r"finite numbers >= 0 a layer, got \(-0\.5"):
        ImportanceFile.load(tmp_path / "importance.json")
