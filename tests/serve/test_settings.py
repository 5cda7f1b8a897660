"""What can be asked of a server, and what is refused; without vLLM."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from modes_fx.errors import ModesFxError, PlanError, ServingError
from modes_fx.plan import PlanPoint, SkipPlan
from modes_fx.serve.settings import Settings, layer_numbers, read_settings

NAMES = ("model.language_model.layers.1.mlp.experts", "model.language_model.layers.3.mlp.experts")
SERVED = ("language_model.model.layers.1.mlp.experts", "language_model.model.layers.3.mlp.experts")


def two_layers(**changes: Any) -> SkipPlan:
    points = (PlanPoint(0.5, 0.1, 0.2), PlanPoint(0.75, 0.2, 0.4, gamma=2.0))
    return SkipPlan(**{"points": points, "alpha": ((0.5, 0.25), (0.5, 0.0)), "layers": NAMES, **changes})


def test_bounds_are_the_plans_by_layer_phase_and_modality() -> None:
    plan = two_layers()
    bounds = Settings(plan, 0.75, 0.5).bounds(SERVED)
    assert torch.equal(bounds[:, 0], plan.bounds(2, 0.75))
    assert torch.equal(bounds[:, 1], plan.bounds(2, 0.5))
    assert bounds[1].tolist() == [pytest.approx([0.8, math.inf]), pytest.approx([0.2, math.inf])]


def test_generated_tokens_have_the_targets_thresholds_unless_told() -> None:
    bounds = Settings(two_layers(), 0.5).bounds(SERVED)
    assert torch.equal(bounds[:, 0], bounds[:, 1])


@pytest.mark.parametrize("order", [SERVED[::-1], SERVED[:1], SERVED[1:]])
def test_layers_are_found_by_name(order: tuple[str, ...]) -> None:
    """As a rank of pipeline parallelism holds some of them."""
    settings = Settings(two_layers(), 0.5)
    whole = dict(zip(SERVED, settings.bounds(SERVED), strict=True))
    assert torch.equal(settings.bounds(order), torch.stack([whole[name] for name in order]))


def test_thresholds_by_hand_fit_any_layers() -> None:
    bounds = Settings(SkipPlan.uniform(text=0.1, vision=0.3)).bounds(SERVED)
    torch.testing.assert_close(bounds, torch.tensor([0.1, 0.3]).expand(2, 2, 2))


def test_a_layer_that_the_plan_does_not_know() -> None:
    with pytest.raises(ServingError, match=r"no thresholds for model\.layers\.2\.mlp\.experts: its layers are 1, 3"):
        Settings(two_layers()).bounds(["model.layers.2.mlp.experts"])


def test_a_layer_that_the_model_lacks() -> None:
    settings = Settings(two_layers())
    settings.check_layers([1], 0, 3)  # 3 is another rank's
    with pytest.raises(ServingError, match="thresholds for layer 3, where the model has no experts"):
        settings.check_layers([1], 0, 4)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model.experts"], "holds 0 numbers"),
        (["model.layers.1.blocks.2.experts"], "holds 2 numbers"),
        (["model.layers.1.text.experts", "model.layers.1.vision.experts"], "Layer 1 has experts in several places"),
    ],
)
def test_names_that_do_not_tell(names: list[str], said: str) -> None:
    with pytest.raises(ServingError, match=said):
        layer_numbers(names)


def read(tmp_path: Path, plan: SkipPlan, **more: Any) -> Settings:
    path = plan.save(tmp_path / "plan.json")
    return read_settings(json.loads(json.dumps({"modes_fx": {"plan": str(path), **more}})))


def test_settings_as_the_command_line_has_them(tmp_path: Path) -> None:
    settings = read(tmp_path, two_layers(), target=0.75, decode_target=0.5)
    assert settings == Settings(two_layers(), 0.75, 0.5)
    assert settings.with_targets(None, 0.75) == Settings(two_layers(), None, 0.75)


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"targt": 0.5}, ServingError, "Unknown setting 'targt'.*known: plan, target, decode_target"),
        ({"target": "0.5"}, PlanError, "A target is a skip ratio in"),
        ({"decode_target": True}, PlanError, "A decode_target is a skip ratio in"),
        ({"target": 0.6}, PlanError, r"no target 0\.6; its targets: 0\.5, 0\.75"),
        ({"decode_target": 0.6}, PlanError, r"no target 0\.6"),
    ],
)
def test_settings_that_are_refused(more: dict[str, Any], error: type[ModesFxError], said: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=said) as raised:
        read(tmp_path, two_layers(), **more)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("given", [None, [], "plan.json", {}, {"target": 0.5}, {"plan": {"points": []}}])
def test_what_is_no_object_with_a_plan(given: Any) -> None:
    with pytest.raises(ServingError, match='is an object with a "plan", the path of a plan file'):
        read_settings({"modes_fx": given})


QUANTILES = (((0.0, 1.0), (0.0, 1.0)),) * 2


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (two_layers(mode="budget", weights=QUANTILES), 'mode "budget" cannot be served.*dataclasses.replace'),
        (SkipPlan.reduce_k(2), "keep-rule 'reduce_k' cannot be served"),
        (two_layers(layers=()), "does not name the layers"),
    ],
)
def test_plans_that_are_refused(plan: SkipPlan, said: str, tmp_path: Path) -> None:
    with pytest.raises(ServingError, match=said):
        read(tmp_path, plan)


def test_the_way_out_of_a_budget_is_one(tmp_path: Path) -> None:
    plan = dataclasses.replace(two_layers(mode="budget", weights=QUANTILES), mode="fixed")
    assert read(tmp_path, plan).plan.mode == "fixed"
