"""What README, docs/ and the like show works as it stands, what they name is there, and what is made of code is fresh."""

import ast
import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from torch import nn

import modes_fx
from benchmarks import chart
from modes_fx.cli import app
from modes_fx.measure.compare import CONTENDERS
from tests import generated, tiny
from tests.calib.conftest import with_answers, without_labels

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")), *sorted(DOCS.glob("*.md"))]

of_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.mark.usefixtures("without_inductor")
def test_the_api_in_ten_lines_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = snippets(README)
    monkeypatch.chdir(tmp_path)
    names = given(model := tiny.make())
    exec(snippet, names)  # the README is ours
    assert modes_fx.SkipPlan.load(tmp_path / "plan.json") == names["plan"]
    assert "2 sites found, 2 rewritten" in capsys.readouterr().out
    assert getattr(model, "_modes_fx", None) is None


@pytest.mark.usefixtures("without_inductor")
def test_the_quickstart_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("quickstart.md")
    assert names["stats"].skip_ratio() > 0
    assert modes_fx.report(names["model"]).found == 2


@pytest.mark.usefixtures("without_inductor")
def test_rules_for_few_tokens_run_as_shown() -> None:
    names = run_page("few-tokens.md", plan=modes_fx.SkipPlan((modes_fx.plan.PlanPoint(0.875, 0.1, 0.2),)))
    assert [names[name].rule for name in ("aware", "oea", "sere")] == ["batch_threshold", "oea", "sere"]
    with modes_fx.stats(names["model"]) as stats:
        names["model"].generate(**names["inputs"])
    assert stats.experts_read()


def run_page(name: str, **more: Any) -> dict[str, Any]:
    """Run what a page shows, each snippet after the one before, and return all names."""
    names = given(tiny.make()) | more
    for snippet in snippets((DOCS / name).read_text(encoding="utf-8")):
        exec(snippet, names)
    return names


def given(model: nn.Module) -> dict[str, Any]:
    """Return what snippets take for granted."""
    inputs = {**without_labels(with_answers(1)), "max_new_tokens": 2}
    ids = inputs["input_ids"]
    return {
        "model": model,
        "inputs": inputs,
        "batches": [with_answers(1), with_answers(2)],
        "ids": (ids == model.config.image_token_id).long(),
        "embeds": model.get_input_embeddings()(ids).detach(),
    }


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)


@pytest.mark.parametrize("name", generated.PARTS)
def test_what_is_made_of_code_is_what_the_code_says(name: str) -> None:
    file, make = generated.PARTS[name]
    page = (DOCS / file).read_text(encoding="utf-8")
    assert generated.part_of(page, name) == make(), "run `make pages`"


def test_the_chart_shows_the_figures_beside_it() -> None:
    figures = json.loads(chart.FIGURES.read_text(encoding="utf-8"))
    drawn = chart.CHART.read_text(encoding="utf-8")
    assert chart.mark(figures) in drawn, "run `python -m benchmarks.chart`"
    for image in (drawn, chart.chart(figures)):
        for row in (*figures["quality"]["modes-fx"], *figures["quality"]["Reduce-k"]):
            assert f">{row['correct']:.1%}<" in image


def test_the_site_has_the_reference_in_the_place_of_each_line() -> None:
    hooks = runpy.run_path(str(DOCS / "hooks.py"))
    page = hooks["on_page_markdown"]((DOCS / "api.md").read_text(encoding="utf-8"))
    assert "\n::: modes_fx.optimize.optimize\n" in page
    assert "- `optimize(" not in page
    assert page.count("\n::: ") == generated.api().count("<!-- name: ")


def test_every_rule_that_is_compared_is_explained() -> None:
    page = (DOCS / "fidelity.md").read_text(encoding="utf-8")
    table = [line.split("|")[1:3] for line in page.split("| `--rules` |")[1].split("\n\n")[0].splitlines()[2:]]
    assert {name for names, _ in table for name in re.findall(r"`(\w+)`", names)} == set(CONTENDERS)


def test_the_version_is_told_alike() -> None:
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {modes_fx.__version__}\n" in cited
    changes = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert changes[0] == modes_fx.__version__


@of_every_page
def test_every_function_that_is_named_exists(page: Path) -> None:
    for path, name in re.findall(r"`([\w-]+/[\w./-]+)::([\w.]+)`", page.read_text(encoding="utf-8")):
        assert name in defined(ROOT / path), f"{path}::{name}"


def defined(file: Path) -> set[str]:
    """Return the functions, classes, methods and values that a file defines."""
    source = file.read_text(encoding="utf-8")
    return set(_defined(ast.parse(source))) if file.suffix == ".py" else set(re.findall(r"^\w.* (\w+)\(", source, re.MULTILINE))


def _defined(tree: ast.Module | ast.ClassDef, before: str = "") -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield before + node.name
        if isinstance(node, ast.ClassDef):
            yield from _defined(node, f"{before}{node.name}.")
        if isinstance(node, ast.Assign):
            yield from (before + target.id for target in node.targets if isinstance(target, ast.Name))


WALK = re.compile(r"^(\d+)\. \*\*(\w+)\*\*(.*?)(?=^\d+\. |\n\n)", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("section", "twice"), [("From plan.json", set()), ("From input_ids", {"attach", "graph"})])
def test_a_walk_stays_in_the_room_that_a_step_names_and_enters_none_again(section: str, twice: set[str]) -> None:
    page = (DOCS / "architecture.md").read_text(encoding="utf-8").split(f"## {section}")[1].split("\n## ")[0]
    steps = WALK.findall(page)
    assert [int(number) for number, _, _ in steps] == list(range(1, len(steps) + 1))
    rooms = [room for _, room, _ in steps]
    assert {room for room in rooms if rooms.count(room) > 1} == twice
    for _, room, text in steps:
        first = re.search(r"`modes_fx/(\w+)[\w/.]*::", text)
        assert first is None or first[1] == room, text


@of_every_page
def test_every_path_that_is_named_exists(page: Path) -> None:
    named = set(re.findall(r"`((?:examples|benchmarks|modes_fx|docs|tests)/[\w./-]+)`", page.read_text(encoding="utf-8")))
    assert {path for path in named if not (ROOT / path).exists()} == set()


@of_every_page
def test_every_make_target_that_is_named_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|^    )make ([\w-]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert named <= set(re.findall(r"^([\w-]+):", makefile, flags=re.MULTILINE))


@of_every_page
def test_every_command_and_option_that_is_named_exists(page: Path) -> None:
    commands: Any = typer.main.get_command(app)
    text = page.read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```.*?^```|^ {4}[^\n]*|`[^`]+`", text, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    for name, rest in re.findall(r"\bmodes-fx ([a-z][\w-]*)([^`\n#]*)", code):
        command = commands.commands[name]
        if hasattr(command, "commands"):
            command = command.commands[rest.split()[0]]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert set(re.findall(r"--[\w-]+", rest)) <= {*known, "--help"}, f"modes-fx {name} {rest}"


@of_every_page
def test_every_link_leads_somewhere(page: Path) -> None:
    assert [link for link in linked(page) if not (page.parent / link).exists()] == []


def test_the_readme_is_short_and_the_pages_are_all_to_be_found() -> None:
    assert len(README.splitlines()) <= 200
    pages = {page.name for page in DOCS.glob("*.md")} - {"README.md"}
    assert pages <= linked(DOCS / "README.md")
    assert {f"docs/{page}" for page in pages} <= linked(ROOT / "README.md")
    assert set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))) == {*pages, "README.md"}


def linked(page: Path) -> set[str]:
    return set(re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")))
