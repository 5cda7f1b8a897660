"""The command as a user types it."""

import copy
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import modes_fx
from modes_fx import cli
from modes_fx.cli import demo
from modes_fx.demo import CHECKPOINT
from tests.demo.test_report import REPORT


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.output.strip()) == (0, modes_fx.__version__)


def test_no_command_lists_the_commands() -> None:
    assert "demo" in run().output


@pytest.mark.parametrize("broken", ["missing", "truncated weights", "no config"])
def test_a_checkpoint_that_cannot_be_read_ends_with_its_name_and_writes_nothing(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    if broken != "missing":
        folder.mkdir()
        for file in CHECKPOINT.iterdir():
            content = file.read_bytes()
            if file.name == "model.safetensors":
                content = content[: len(content) // 2]
            if not (broken == "no config" and file.name == "config.json"):
                (folder / file.name).write_bytes(content)
    monkeypatch.setattr("sys.argv", ["modes-fx", "demo", "--checkpoint", str(folder), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    assert str(folder) in capsys.readouterr().err.replace("\n", "")
    assert not (tmp_path / "out").exists()


def test_the_table_tells_what_the_report_holds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    facts = copy.deepcopy(REPORT)
    facts["speed"]["prefill_ms"]["modes-fx at 0.5"] = facts["speed"]["decode_ms_per_token"]["modes-fx at 0.5"] = 20.0
    demo._print_demo(facts, tmp_path)
    shown = capsys.readouterr().out
    assert f"{facts['targets'][-1]['realised']['test']:.1%}" in shown
    assert f"{facts['dense']['accuracy']:.1%}" in shown
    assert f"Reduce-k {facts['reduce_k'][-1]['k']}" in shown
    best = min(ms for name, ms in facts["speed"]["prefill_ms"].items() if name.startswith("stock"))
    assert f"{best / facts['speed']['prefill_ms']['modes-fx at 0.875']:.2f}x" in shown
