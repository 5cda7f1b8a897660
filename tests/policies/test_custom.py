"""The example of a user's own rule runs, and its rule is one like the package's."""

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import modes_fx
from modes_fx.errors import PlanError
from modes_fx.plan import PlanPoint, SkipPlan
from modes_fx.policies import RULES, Rule, register
from tests import harness, tiny

pytestmark = pytest.mark.usefixtures("without_inductor")


@pytest.fixture
def example() -> Iterator[ModuleType]:
    path = Path(__file__).parents[2] / "examples" / "custom_policy.py"
    spec = importlib.util.spec_from_file_location("custom_policy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    RULES.pop("top_share", None)


def test_the_example_runs_and_skips_more_with_larger_bounds(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    said = capsys.readouterr().out
    ratios = [float(line.split(": ")[1].split("%")[0]) for line in said.splitlines() if line.startswith("bounds")]
    assert ratios[0] == 0.0
    assert ratios[0] < ratios[1] < ratios[2] < 100
    assert "8 sites found, 8 rewritten" in said


def test_a_rule_of_ones_own_is_loaded_once_it_is_known(example: ModuleType, tmp_path: Path, vlm: nn.Module) -> None:
    register("top_share", Rule(example.top_share, keep_all=0.0, skip_all=math.inf))
    tables = ((0.0, *[1.0] * 5),) * 2
    made = SkipPlan((PlanPoint(None, 0.6, 0.6),), rule="top_share", tables=tables)
    path = made.save(tmp_path / "plan.json")
    modes_fx.optimize(vlm, path)
    with modes_fx.stats(vlm) as stats:
        harness.logits(vlm, tiny.mixed_batch())
    assert 0 < stats.skip_ratio() < 1
    del RULES["top_share"]
    with pytest.raises(PlanError, match=r"Unknown keep-rule 'top_share'.*register"):
        SkipPlan.load(path)


def test_its_decisions_are_those_it_describes(example: ModuleType) -> None:
    weights, ids = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]), torch.tensor([[1, 2, 3], [1, 0, 2]])
    table = torch.tensor([0.0, 1.0, 1.0, 1.0])
    keep = example.top_share(weights, torch.tensor([0.4, 0.4]), ids, table)
    assert keep.tolist() == [[True, True, True], [True, False, True]]
