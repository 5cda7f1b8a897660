"""Plans from the reference implementation's files: every form that is taken, the decisions that follow, what is refused."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from modes_fx.calib import import_reference
from modes_fx.errors import PlanError
from modes_fx.plan import SkipPlan
from tests import tiny
from tests.calib.conftest import Malicious

CONFIG = tiny.make().config
ROWS = ((0.75, 0.25), (0.25, 0.75))
TAUS = {"tau_text": 0.0625, "tau_vision": 0.125}


def imported(tmp_path: Path, importance: Any, taus: Any, config: Any = CONFIG, **options: Any) -> SkipPlan:
    torch.save(importance, tmp_path / "importance.pt")
    torch.save(taus, tmp_path / "tau.pt")
    return import_reference(tmp_path / "importance.pt", tmp_path / "tau.pt", config, **options)


@pytest.mark.parametrize(
    "importance",
    [
        {0: {"text": 0.75, "vision": 0.25}, 1: {"text": 0.25, "vision": 0.75}},
        {"layers.3.mlp": {"language": 0.25, "image": 0.75}, "layers.2.mlp": {"language": 0.75, "image": 0.25}},
        {"text": [0.75, 0.25], "visual": torch.tensor([0.25, 0.75])},
        {"text": {1: 0.25, 0: 0.75}, "vision": {"0": 0.25, "1": torch.tensor([0.75])}},
        torch.tensor(ROWS, dtype=torch.bfloat16),
        np.array(ROWS),
        [{"text": 0.75, "vision": 0.25}, {"text": 0.25, "vision": 0.75}],
        [(0.75, 0.25), [0.25, np.float64(0.75)]],
        {"alpha": torch.tensor(ROWS)},
    ],
    ids=["layer, modality", "named", "modality, list", "modality, layer", "tensor", "array", "dicts", "pairs", "in a dict"],
)
def test_importance_by_modality(tmp_path: Path, importance: Any) -> None:
    assert imported(tmp_path, importance, TAUS).alpha == ROWS


@pytest.mark.parametrize(
    "importance",
    [
        {2: 0.25, 10: 0.75},
        {"10": 0.75, "2": 0.25},
        {0: torch.tensor([0.25]), 1: np.array([[0.75]])},
        [0.25, 0.75],
        torch.tensor([0.25, 0.75]),
    ],
)
def test_importance_for_both_modalities(tmp_path: Path, importance: Any) -> None:
    assert imported(tmp_path, importance, TAUS).alpha == ((0.25, 0.25), (0.75, 0.75))


@pytest.mark.parametrize(
    "taus",
    [
        TAUS,
        {"tau_t": 0.0625, "tau_v": 0.125, "note": "any"},
        [{"tau_text": np.float64(0.0625), "tau_visual": 0.125}],
        {"tau_text": torch.tensor(0.0625), "tau_image": torch.tensor([0.125])},
    ],
)
def test_one_pair_of_thresholds(tmp_path: Path, taus: Any) -> None:
    plan = imported(tmp_path, torch.tensor(ROWS), taus)
    (point,) = plan.points
    assert (point.target, point.tau_text, point.tau_vision, point.gamma) == (None, 0.0625, 0.125, 1.0)
    torch.testing.assert_close(plan.bounds(2), torch.tensor([[0.0625 / 0.75, 0.5], [0.25, 0.125 / 0.75]]))


@pytest.mark.parametrize(
    "taus",
    [
        [{**TAUS, "target": 0.8}, {**TAUS, "target": 0.5, "kl": 0.1}],
        [{**TAUS, "skip_ratio": 0.8}, {**TAUS, "rho": 0.5}],
        {0.8: TAUS, "0.5": TAUS},
    ],
)
def test_thresholds_by_target(tmp_path: Path, taus: Any) -> None:
    plan = imported(tmp_path, torch.tensor(ROWS), taus)
    assert plan.targets == (0.5, 0.8)
    assert [point.target for point in plan.points] == [0.5, 0.8]


@pytest.mark.parametrize("normalized_on_load", [False, True])
@pytest.mark.parametrize("factor", [1.0, 2.5])
@pytest.mark.parametrize("scale", [(1.0, 1.0), (0.5, 4.0)])
def test_the_decisions_are_the_references(
    tmp_path: Path, scale: tuple[float, float], factor: float, normalized_on_load: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = torch.tensor(ROWS, dtype=torch.float64) * torch.tensor(scale)
    used = stored / stored.sum(dim=0) if normalized_on_load else stored
    config = SimpleNamespace(num_hidden_layers=2, routed_scaling_factor=factor)
    plan = imported(tmp_path, stored, TAUS, config, normalized_on_load=normalized_on_load)
    pi = torch.rand(2, 2, 1000, generator=generator, dtype=torch.float64)  # [layer, modality, pairs], before the factor
    skipped = used[..., None] * pi < torch.tensor(list(TAUS.values()))[None, :, None]
    assert 0.05 < skipped.double().mean() < 0.95
    assert (pi * factor < plan.bounds(2)[..., None]).equal(skipped)
    assert torch.tensor(plan.alpha).sum(dim=0).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("facts", "factor"),
    [
        ({"routed_scaling_factor": 2.446}, 2.446),
        ({"router_scaling_factor": 2.0}, 2.0),
        ({"routed_scaling_factor": None}, 1.0),
        ({"routed_scaling_factor": 2.0, "model_type": "minimax_m3_vl_text"}, 1.0),
    ],
)
def test_the_models_constant_factor_is_in_its_text_config(tmp_path: Path, facts: dict[str, Any], factor: float) -> None:
    text = SimpleNamespace(num_hidden_layers=4, **facts)
    plan = imported(tmp_path, torch.tensor(ROWS), TAUS, SimpleNamespace(get_text_config=lambda: text))
    assert plan.points[0].tau_text == 0.0625 * factor
    assert plan.provenance["routed_scaling_factor"] == factor


def test_the_plan_is_for_its_model_says_where_it_came_from_and_survives_a_file(tmp_path: Path) -> None:
    plan = imported(tmp_path, torch.tensor(ROWS) * 2, {0.8: TAUS})
    plan.check_model(CONFIG)
    with pytest.raises(PlanError, match="another model"):
        plan.check_model(tiny.make("mixtral").config)
    assert plan.provenance["importance_sums"] == {"text": 2.0, "vision": 2.0}
    assert set(plan.provenance["imported"]) == {"importance", "thresholds"}
    assert SkipPlan.load(plan.save(tmp_path / "plan.json")) == plan


@pytest.mark.parametrize(
    ("importance", "reason"),
    [
        ({}, "empty"),
        ([], "a list of 0"),
        ("text", "'text'"),
        (3.0, "3.0"),
        ({"a": 1.0}, "'a' is no layer"),
        ({0.5: 1.0}, "0.5 is no layer"),
        ({-1: 1.0}, "-1 is no layer"),
        ({1: 0.5, "1": 0.5}, "named twice"),
        ({0: {"text": 1.0, "audio": 1.0}}, "'audio' is no modality"),
        ({0: {"text": 1.0}}, "0 values for vision"),
        ({0: {"text": 1.0, "vision": 1.0, "image": 1.0}}, "2 values for vision"),
        ({"text": [1.0], "vision": [0.5, 0.5]}, "1 layers for text, 2 for vision"),
        ({"text": 0.5, "vision": 0.5}, "number for each layer"),
        (torch.ones(2, 3), "a list of 3"),
        (torch.ones(2, 2, 2), "number is expected"),
        ([True, False], "True"),
        (["0.5"], "'0.5'"),
        (torch.zeros(2), "sums to 0"),
        (torch.tensor([0.5, float("nan")]), "sums to nan"),
        (torch.tensor([1.5, -0.5]), r"importance\.pt.*>= 0"),
        ([10**400, 1], "Number|float|large"),
        (torch.ones(3), "3 layers, the model has 2"),
    ],
    ids=str,
)
def test_importance_of_another_form_is_refused_with_what_was_found(tmp_path: Path, importance: Any, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        imported(tmp_path, importance, TAUS)


@pytest.mark.parametrize(
    ("taus", "reason"),
    [
        ({}, "0 pairs"),
        ([0.1, 0.2], "expected a dict with tau_text"),
        ({0.8: [0.1, 0.2]}, "expected a dict with tau_text"),
        ({"tau_text": 0.1}, "0 values for vision"),
        ({"tau_text": 0.1, "tau_audio": 0.1}, "'audio' is no modality"),
        ({"text": 0.1, "vision": 0.1}, "'text' is no target"),
        ({0.8: {"text": 0.1}}, "the keys 'text'"),
        ({"tau_text": "0.1", "tau_vision": 0.1}, "'0.1'"),
        ([TAUS, TAUS], "expected a target for each"),
        ([{**TAUS, "target": 0.5}, {**TAUS, "ratio": 0.5}], "no two alike"),
        ({0.8: {**TAUS, "target": 0.8}}, "several targets"),
        ({80: TAUS}, r"\[0, 1\]"),
        ({"tau_text": -0.1, "tau_vision": 0.1}, "tau_text"),
    ],
    ids=str,
)
def test_thresholds_of_another_form_are_refused_with_what_was_found(tmp_path: Path, taus: Any, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        imported(tmp_path, torch.tensor(ROWS), taus)


def test_a_file_that_holds_more_than_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"tau\.pt.*posix\.system"):
        imported(tmp_path, torch.tensor(ROWS), {**TAUS, "note": Malicious(os.system, "exit 1")})
