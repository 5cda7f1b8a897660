"""``plan check`` and ``plan sign`` as a user types them."""

import json
from pathlib import Path

import pytest

from modes_fx.errors import PlanError
from modes_fx.plan import PlanPoint, SkipPlan
from tests.cli.command import run


@pytest.fixture
def path(tmp_path: Path) -> Path:
    plan = SkipPlan((PlanPoint(0.5, 0.1, 0.2), PlanPoint(0.75, 0.2, 0.4)), layers=("a", "b"), model={"model_type": "mixtral"})
    return plan.save(tmp_path / "plan.json")


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace('"tau_text": 0.1', '"tau_text": 0.15'))


def test_check_tells_what_a_whole_plan_holds(path: Path) -> None:
    before = path.read_bytes()
    said = " ".join(run("plan", "check", path).output.split())
    assert said == "The plan is whole: rule threshold, targets 0.5, 0.75, for mixtral, 2 MoE layers."
    assert path.read_bytes() == before


def test_a_plan_changed_on_purpose_is_refused_until_it_is_signed(path: Path) -> None:
    edit(path)
    with pytest.raises(PlanError, match=r"plan\.json is not as it was written.*plan sign"):
        run("plan", "check", path)
    assert "The plan is signed" in run("plan", "sign", path).output
    assert "The plan is whole" in run("plan", "check", path).output
    assert SkipPlan.load(path).point(0.5).tau_text == 0.15


def test_an_old_plan_is_signed(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = {**json.loads(path.read_text()), "schema_version": 2}
    del content["digest"]
    path.write_text(json.dumps(content))
    run("plan", "sign", path)
    caplog.clear()
    assert SkipPlan.load(path).targets == (0.5, 0.75)
    assert not caplog.records


@pytest.mark.parametrize(
    ("before", "after", "match"),
    [
        ('"tau_text": 0.1', '"tau_text": "x"', "tau_text"),
        ('"rule": "threshold"', '"rule": "?"', "keep-rule"),
        ("{", "[", "JSON"),
    ],
)
def test_what_is_no_plan_is_not_signed(path: Path, before: str, after: str, match: str) -> None:
    content = path.read_text().replace(before, after, 1)
    path.write_text(content)
    with pytest.raises(PlanError, match=match):
        run("plan", "sign", path)
    assert path.read_text() == content
