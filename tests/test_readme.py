"""What the README shows works as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest

import modes_fx
from tests import tiny
from tests.calib.conftest import with_answers, without_labels

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("without_inductor")
def test_the_api_in_ten_lines_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    model = tiny.make()
    inputs = {**without_labels(with_answers(1)), "max_new_tokens": 2}
    names: dict[str, Any] = {"model": model, "batches": [with_answers(1), with_answers(2)], "inputs": inputs}
    exec(snippet, names)  # the README is ours
    assert modes_fx.SkipPlan.load(tmp_path / "plan.json") == names["plan"]
    assert "2 sites found, 2 rewritten" in capsys.readouterr().out
    assert getattr(model, "_modes_fx", None) is None


def test_every_path_that_is_named_exists() -> None:
    root = Path(__file__).parent.parent
    named = set(re.findall(r"`((?:examples|benchmarks|modes_fx)/[\w./]+)`", README))
    assert named
    assert {path for path in named if not (root / path).exists()} == set()


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    assert set(re.findall(r"\bmake (\w+)\b(?= |`|$)", README)) <= set(re.findall(r"^(\w+):", makefile, flags=re.MULTILINE))
