"""Each sentence of docs/threat-model.md, tested."""

import json
import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import modes_fx
from modes_fx import cli
from modes_fx.calib import Importance
from modes_fx.calib.importance_file import ImportanceFile
from modes_fx.calib.journal import Journal
from modes_fx.calib.safe_pickle import load_numbers
from modes_fx.errors import CalibrationError, ModelError, ModesFxError, PlanError
from modes_fx.files import signed_json
from modes_fx.models.meta_model import read_config
from modes_fx.plan import SkipPlan, describe_model
from tests import tiny

SENTENCES = re.findall(
    r"^- (.*?)(?=\n-|\n\n|\Z)", (Path(__file__).parents[1] / "docs" / "threat-model.md").read_text(), re.MULTILINE | re.DOTALL
)
ABOUT = {"model": "m"}
tested: list[str] = []


def says(sentence: str) -> Callable[[Any], Any]:
    """Note that a test stands for a sentence."""
    tested.append(sentence)
    return lambda test: test


def write_plan(folder: Path, **changes: Any) -> Path:
    return changed(SkipPlan.uniform(text=0.1, vision=0.2).save(folder / "plan.json"), changes)


def write_importance(folder: Path, **changes: Any) -> Path:
    rows = ((0.5, 0.5), (0.5, 0.5))
    model = describe_model(tiny.make().config)
    file = ImportanceFile(Importance(rows, rows, "reference", 1), ("a", "b"), model, "data", {})
    return changed(file.save(folder / "importance.json"), changes)


def write_journal(folder: Path, **changes: Any) -> Path:
    path = folder / "journal.jsonl"
    path.unlink(missing_ok=True)
    Journal(path, ABOUT).add(("trial", 1), {"kl": 0.5})
    first, line = path.read_text().splitlines()
    path.write_text(f"{first}\n{json.dumps(signed_json.signed({**json.loads(line), **changes}))}\n{line}\n")
    return path


def changed(path: Path, changes: dict[str, Any]) -> Path:
    path.write_text(json.dumps(signed_json.signed({**json.loads(path.read_text()), **changes})))
    return path


FILES: dict[str, tuple[Callable[..., Path], Callable[[Path], Any]]] = {
    "plan": (write_plan, SkipPlan.load),
    "importance": (write_importance, ImportanceFile.load),
    "journal": (write_journal, lambda path: Journal(path, ABOUT)),
}


@says("None of their content is run: they are JSON of known fields and types, and a field that is not known is refused.")
@pytest.mark.parametrize("kind", FILES)
def test_a_field_that_is_not_known_is_refused(tmp_path: Path, kind: str) -> None:
    write, read = FILES[kind]
    read(write(tmp_path))
    with pytest.raises(ModesFxError, match="unknown field `run`"):
        read(write(tmp_path, run="os.system"))


WATCHED = """
import sys
sys.argv = ["modes-fx"]
from pathlib import Path
from modes_fx.files import importance_fields, plan_fields
paths, seen = sys.stdin.read().split(), []

def read():
    plan_fields.read(paths[0])
    importance_fields.read(paths[1])

read()  # evaluates the annotations of the fields, which are ours
sys.addaudithook(lambda event, args: seen.append((event, args)))
read()
events = [(event, str(args[0]), args[1] if event == "open" else "") for event, args in list(seen)
          if event.partition(".")[0] in ("open", "os", "socket", "subprocess", "shutil", "exec", "import")]
print(events)
"""


@says("Reading one opens no other file, writes nothing, starts no process and asks no network.")
def test_reading_touches_that_file_alone(tmp_path: Path) -> None:
    paths = [str(write_plan(tmp_path)), str(write_importance(tmp_path))]
    environment = {**os.environ, "PYTHONPATH": str(Path(modes_fx.__file__).parents[1])}
    command = [sys.executable, "-c", WATCHED]
    said = subprocess.run(command, input="\n".join(paths), env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str([("open", path, "r") for path in paths])


@says("A file of more than 256 MiB, or nested more than 32 deep, is refused.")
@pytest.mark.parametrize("kind", FILES)
def test_large_and_deep_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    assert (signed_json.MAX_BYTES, signed_json.MAX_DEPTH) == (256 << 20, 32)
    write, read = FILES[kind]
    deep: Any = {}
    for _ in range(40):
        deep = {"a": deep}
    name = {"plan": "provenance", "importance": "model", "journal": "value"}[kind]
    with pytest.raises(ModesFxError, match="nested more than 32 deep"):
        read(write(tmp_path, **{name: deep}))
    path = write(tmp_path)
    monkeypatch.setattr(signed_json, "MAX_BYTES", 100)
    with pytest.raises(ModesFxError, match="it has more than"):
        read(path)


@says("What a file says is shown without control characters.")
@pytest.mark.parametrize("command", ["check", "sign"])
def test_no_escape_sequence_reaches_the_screen(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_plan(tmp_path, model={"model_type": "\x1b[2J\x9b31mcleared"})
    monkeypatch.setattr("sys.argv", ["modes-fx", "plan", command, str(path)])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr()
    assert "\\x1b[2J\\x9b31mcleared" in said.out
    write_plan(tmp_path, **{"\x1b[2J": 1})
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr()
    assert "\\x1b[2J" in said.err
    assert not {"\x1b", "\x9b"} & set(said.out + said.err)


@says("The digest tells damage, not the author: whoever changes a plan can sign it.")
def test_a_changed_plan_that_was_signed_is_taken(tmp_path: Path) -> None:
    path = write_plan(tmp_path)
    content = json.loads(path.read_text())
    content["points"][0]["tau_text"] = 0.9
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match="digest does not fit"):
        SkipPlan.load(path)
    assert SkipPlan.load(changed(path, {})).points[0].tau_text == 0.9


@says("A plan can make a model's answers as bad as its author likes: any threshold is taken, up to skipping every expert.")
def test_a_plan_may_skip_all(tmp_path: Path) -> None:
    plan = SkipPlan.load(write_plan(tmp_path, points=[{"target": None, "tau_text": "inf", "tau_vision": "inf"}]))
    assert plan.bounds(2).tolist() == [[math.inf, math.inf]] * 2


@says("A plan that names a model is refused for every other architecture; one that names none is taken for any.")
def test_a_plan_is_for_the_model_it_names(tmp_path: Path) -> None:
    other = tiny.make("mixtral").config
    SkipPlan.load(write_plan(tmp_path)).check_model(other)
    mine = SkipPlan.load(write_plan(tmp_path, model=describe_model(tiny.make().config)))
    with pytest.raises(PlanError, match="made for another model"):
        mine.check_model(other)


@says("A plan names its keep-rule, and only rules that the program itself registered are known.")
@pytest.mark.parametrize("rule", ["os.system", "modes_fx.policies.naee", "__import__('os')"])
def test_a_rule_that_is_not_registered_is_refused(tmp_path: Path, rule: str) -> None:
    with pytest.raises(PlanError, match="Unknown keep-rule"):
        SkipPlan.load(write_plan(tmp_path, rule=rule))


@says("An importance can weigh layers as its author likes, and is refused for every other architecture than its own.")
def test_an_importance_is_for_its_model(tmp_path: Path) -> None:
    path = write_importance(tmp_path)
    importance = {**json.loads(path.read_text())["importance"], "alpha": [[1e9, 0.0], [0.0, 1e9]]}
    read = ImportanceFile.load(changed(path, {"importance": importance}))
    assert read.importance.alpha == ((1e9, 0.0), (0.0, 1e9))
    read.check_model(tiny.make())
    with pytest.raises(CalibrationError, match="measured on another model"):
        read.check_model(tiny.make("mixtral"))


@says("A journal of another model, data or versions is refused, and left as it is.")
@pytest.mark.parametrize("name", ["model", "data", "versions"])
def test_a_journal_is_for_its_run(tmp_path: Path, name: str) -> None:
    path = write_journal(tmp_path)
    before = path.read_bytes()
    with pytest.raises(CalibrationError, match="belongs to another run"):
        Journal(path, {**ABOUT, name: "other"})
    assert path.read_bytes() == before


@says("A journal's numbers are believed: a forged entry is taken for a measurement.")
def test_a_forged_entry_is_believed(tmp_path: Path) -> None:
    path = write_journal(tmp_path, key=["trial", 2], value={"kl": 0.0})
    assert Journal(path, ABOUT).get(("trial", 2), dict) == {"kl": 0.0}


class Runs:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@says("Nothing that a pickle names is called but containers, numbers and arrays.")
@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_that_runs_something_is_refused_first(tmp_path: Path, save: Callable[..., Any]) -> None:
    save({"importance": [0.5, Runs(tmp_path / "ran")]}, tmp_path / "file")
    with pytest.raises(PlanError, match="nothing in the file was run"):
        load_numbers(tmp_path / "file")
    assert not (tmp_path / "ran").exists()


@says("A tensor or array that claims more than 1,048,576 numbers is refused before it is unpacked.")
def test_a_tensor_of_few_bytes_that_claims_many_numbers_is_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(1).expand(1 << 40), tmp_path / "file")
    assert (tmp_path / "file").stat().st_size < 10_000
    with pytest.raises(PlanError, match="more than 1048576"):
        load_numbers(tmp_path / "file")


@says("Python code that comes with a model is run only if `trust_remote_code` says so.")
def test_a_models_own_code_is_not_run_unasked(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}')
    (tmp_path / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        read_config(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_every_sentence_has_a_test_and_every_test_its_sentence() -> None:
    assert [" ".join(sentence.split()) for sentence in SENTENCES] == tested
