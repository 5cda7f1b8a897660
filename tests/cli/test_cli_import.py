"""``import-reference`` as a user types it."""

from pathlib import Path

import pytest
import torch

from modes_fx.demo import CHECKPOINT, load
from modes_fx.errors import ModelError, PlanError
from modes_fx.plan import SkipPlan
from tests.cli.command import run


@pytest.fixture
def files(tmp_path: Path) -> tuple[object, ...]:
    torch.save(torch.full((8, 2), 0.25), tmp_path / "importance.pt")
    torch.save({0.8: {"tau_text": 0.5, "tau_vision": 1.0}}, tmp_path / "tau.pt")
    return ("--importance", tmp_path / "importance.pt", "--tau", tmp_path / "tau.pt", "--out", tmp_path / "plan.json")


def test_files_of_the_reference_become_a_plan_for_the_model(tmp_path: Path, files: tuple[object, ...]) -> None:
    result = run("import-reference", CHECKPOINT, *files)
    assert result.exit_code == 0, result.output
    for said in ("8 layers", "targets 0.8", "2 for text", "scaled by 1."):
        assert said in result.output.replace("\n", " ")
    plan = SkipPlan.load(tmp_path / "plan.json")
    assert (plan.alpha, plan.targets) == (((0.125, 0.125),) * 8, (0.8,))
    assert (plan.point().tau_text, plan.point().tau_vision) == (0.25, 0.5)
    plan.check_model(load()[0].config)
    run("import-reference", CHECKPOINT, *files, "--normalized-on-load")
    assert SkipPlan.load(tmp_path / "plan.json").point().tau_text == 0.5


def test_what_cannot_be_read_is_named_and_writes_nothing(tmp_path: Path, files: tuple[object, ...]) -> None:
    with pytest.raises(ModelError, match=r"none"):
        run("import-reference", tmp_path / "none", *files)
    (tmp_path / "tau.pt").write_bytes(b"?")
    with pytest.raises(PlanError, match=r"tau\.pt"):
        run("import-reference", CHECKPOINT, *files)
    assert not (tmp_path / "plan.json").exists()
