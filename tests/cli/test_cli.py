"""The command as a user types it."""

import copy
import json
from pathlib import Path

import pytest

import modes_fx
from modes_fx import cli
from modes_fx.cli import demo
from modes_fx.demo import CHECKPOINT
from tests import tiny
from tests.cli.command import run
from tests.demo.test_report import REPORT


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.output.strip()) == (0, modes_fx.__version__)


def test_no_command_lists_the_commands() -> None:
    assert "demo" in run().output


@pytest.mark.parametrize("broken", ["missing", "truncated weights", "no config", "another kind"])
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
            if broken == "another kind" and file.name == "config.json":
                content = b'{"model_type": "internvl"}'
            if not (broken == "no config" and file.name == "config.json"):
                (folder / file.name).write_bytes(content)
    monkeypatch.setattr("sys.argv", ["modes-fx", "demo", "--checkpoint", str(folder), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    said = capsys.readouterr().err.replace("\n", "")
    assert str(folder) in said
    assert ("'internvl'" in said) == (broken == "another kind")
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


def saved(family: str, folder: Path) -> str:
    tiny.make(family).config.save_pretrained(folder)
    return str(folder)


def test_inspect_shows_every_site_and_its_sizes(tmp_path: Path) -> None:
    result = run("inspect", saved("deepseek_v3", tmp_path))
    assert result.exit_code == 0
    for shown in ("2 of 2 routing sites", "model.layers.{1-2}.mlp.experts", "deepseek_v3", "grouped_mm -> compact"):
        assert shown in result.stdout
    each = run("inspect", saved("deepseek_v3", tmp_path), "--all", "--device", "cuda").stdout
    assert each.count("grouped_mm -> static") == 2
    assert "model.layers.2.mlp.experts" in each


def test_inspect_prints_one_json_object_alone(tmp_path: Path) -> None:
    result = run("inspect", saved("qwen3_vl_moe", tmp_path) + "/config.json", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == modes_fx.inspect(tmp_path).as_dict()


def test_inspect_ends_with_1_when_nothing_would_be_rewritten(tmp_path: Path) -> None:
    tiny.dense().config.save_pretrained(tmp_path)
    result = run("inspect", str(tmp_path))
    assert result.exit_code == 1
    assert "there is nothing to skip" in " ".join(result.stdout.split())
    as_json = run("inspect", str(tmp_path), "--json")
    assert (as_json.exit_code, json.loads(as_json.stdout)["found"]) == (1, 0)


def test_inspect_says_what_is_wrong_with_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_json = run("inspect", str(tmp_path), "--json")
    assert as_json.exit_code == 1
    assert "has no config.json" in json.loads(as_json.stdout)["error"]
    monkeypatch.setattr("sys.argv", ["modes-fx", "inspect", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    assert "config.json" in capsys.readouterr().err
