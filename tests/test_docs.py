"""What the README and the pages of docs/ show works as it stands, and what they name is there."""

import re
from pathlib import Path
from typing import Any

import pytest

import modes_fx
from tests import tiny
from tests.calib.conftest import with_answers, without_labels

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

of_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


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


@of_every_page
def test_every_path_that_is_named_exists(page: Path) -> None:
    named = set(re.findall(r"`((?:examples|benchmarks|modes_fx|docs)/[\w./-]+)`", page.read_text(encoding="utf-8")))
    assert {path for path in named if not (ROOT / path).exists()} == set()


@of_every_page
def test_every_make_target_that_is_named_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|^    )make ([\w-]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert named <= set(re.findall(r"^([\w-]+):", makefile, flags=re.MULTILINE))


@of_every_page
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    assert len(README.splitlines()) <= 200
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= set(re.findall(r"\]\(([^)]+)\)", README))
