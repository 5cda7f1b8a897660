"""Skip plans: bounds, files, and what is refused."""

import dataclasses
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modes_fx.errors import ModesFxError, PlanError
from modes_fx.files import signed_json
from modes_fx.files.plan_fields import SCHEMA_VERSION
from modes_fx.plan import PlanPoint, SkipPlan, config_hash, describe_model
from tests import tiny

INF = math.inf
ALPHA = ((0.5, 0.75), (0.3, 0.25), (0.2, 0.0))
POINTS = (
    PlanPoint(0.5, 0.01, 0.02, 0.5, {"calibration": 0.51, "text": 0.4}, {"calibration": 0.1, "held_out": 0.2}),
    PlanPoint(0.875, 0.1, INF, 1.0),
)
FRONTIER = tuple(
    PlanPoint(None, 0.01 * step, 0.02 * step, 0.5, {"calibration": ratio}, {"calibration": kl})
    for step, (ratio, kl) in enumerate([(0.25, 1e-6), (0.52, 1e-3), (0.7, 0.2), (0.9, 0.5)])
)
NUMBER = st.one_of(st.floats(0, 1e6, width=32), st.just(INF))


@pytest.fixture
def plan() -> SkipPlan:
    config = tiny.make().config
    return SkipPlan(
        POINTS,
        ALPHA,
        layers=("a.experts", "b.experts", "c.experts"),
        model=describe_model(config),
        provenance={"seed": 3, "versions": {"torch": "2"}},
        frontier=FRONTIER,
        mode="budget",
        weights=(((0.1, 0.25), (0.1, 0.5)),) * 3,
    )


@pytest.fixture
def path(plan: SkipPlan, tmp_path: Path) -> Path:
    return plan.save(tmp_path / "plan.json")


def changed(path: Path, **changes: Any) -> Path:
    """Change a plan file's fields and sign it anew; None leaves a field out."""
    left_out = {name for name, value in changes.items() if value is None}
    content = {name: value for name, value in {**json.loads(path.read_text()), **changes}.items() if name not in left_out}
    path.write_text(json.dumps(signed_json.signed(content)))
    return path


def unsigned(path: Path, version: int, **changes: Any) -> Path:
    """Make a plan file one of a schema that had no digest."""
    content = json.loads(changed(path, schema_version=version, **changes).read_text())
    path.write_text(json.dumps({name: value for name, value in content.items() if name != signed_json.DIGEST}))
    return path


def test_what_was_saved_is_what_is_loaded(plan: SkipPlan, path: Path) -> None:
    assert SkipPlan.load(path) == plan
    assert SkipPlan.load(str(path)) == plan


def test_an_infinite_threshold_survives_in_standard_json(path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    assert SkipPlan.load(path).point(0.875).tau_vision == INF


@settings(max_examples=40)
@given(text=NUMBER, vision=NUMBER, gamma=st.floats(0, 4), rule=st.sampled_from(["threshold", "reduce_k"]))
def test_any_thresholds_survive_a_file(
    tmp_path_factory: pytest.TempPathFactory, text: float, vision: float, gamma: float, rule: str
) -> None:
    plan = SkipPlan((PlanPoint(None, text, vision, gamma),), rule=rule)
    assert SkipPlan.load(plan.save(tmp_path_factory.mktemp("plan") / "plan.json")) == plan


def test_an_interrupted_save_leaves_the_old_plan_and_nothing_else(
    plan: SkipPlan, path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("elsewhere")))
    with pytest.raises(ModesFxError, match="No space"):
        SkipPlan.uniform(text=0.5, vision=0.5).save(path)
    assert SkipPlan.load(path) == plan
    assert os.listdir(path.parent) == [path.name]


def test_targets_ascend_and_the_largest_is_the_default(plan: SkipPlan) -> None:
    assert plan.targets == (0.5, 0.875)
    assert plan.point() == POINTS[1]
    assert plan.point(0.5) == POINTS[0]
    assert plan.point(0.25 + 0.25) == POINTS[0]


@pytest.mark.parametrize(("target", "index"), [(0.25, 0), (0.2501, 1), (0.499, 1), (0.52, 1), (0.6, 2), (0.87, 3), (0.9, 3)])
def test_any_ratio_of_the_frontier_is_its_cheapest_point_that_reaches_it(plan: SkipPlan, target: float, index: int) -> None:
    assert plan.point(target) is FRONTIER[index]
    assert plan.bounds(3, target).equal(SkipPlan((FRONTIER[index],), ALPHA).bounds(3))


def test_a_target_that_was_searched_for_is_that_point_and_none_of_the_frontier(plan: SkipPlan) -> None:
    assert plan.target_range == (0.25, 0.9)
    assert [plan.point(target) for target in plan.targets] == list(POINTS)
    assert plan.point() is POINTS[1]


@pytest.mark.parametrize("target", [0.2499, 0.9001, 1, math.nan])
def test_a_ratio_outside_of_the_frontier_is_refused_with_what_is_inside(plan: SkipPlan, target: float) -> None:
    with pytest.raises(PlanError, match=r"0\.5, 0\.875 and any from 0\.25 to 0\.9\."):
        plan.point(target)


@pytest.mark.parametrize(
    "frontier",
    [(POINTS[1],), (FRONTIER[1], FRONTIER[0]), (FRONTIER[0], FRONTIER[0])],
    ids=["not measured", "descending", "twice"],
)
def test_a_frontier_that_is_none_is_refused(plan: SkipPlan, frontier: tuple[PlanPoint, ...]) -> None:
    with pytest.raises(PlanError, match="frontier"):
        dataclasses.replace(plan, frontier=frontier)


def test_a_file_of_the_first_schema_has_no_frontier(plan: SkipPlan, path: Path) -> None:
    first = SkipPlan.load(unsigned(path, 1, frontier=None, mode=None, weights=None))
    assert first == dataclasses.replace(plan, frontier=(), mode="fixed", weights=())
    assert first.target_range is None


def test_a_file_from_before_the_digest_loads_with_one_warning(
    plan: SkipPlan, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert SkipPlan.load(unsigned(path, 2)) == plan
    (record,) = caplog.records
    assert "modes-fx plan sign" in record.getMessage()


def test_a_file_of_the_second_schema_without_a_frontier_is_not_whole(path: Path) -> None:
    with pytest.raises(PlanError, match="not a whole skip plan"):
        SkipPlan.load(unsigned(path, 2, frontier=None))


def test_a_changed_number_is_refused_with_what_to_do_and_loads_once_it_is_signed(plan: SkipPlan, path: Path) -> None:
    path.write_text(path.read_text().replace('"tau_text": 0.1,', '"tau_text": 0.7,', 1))
    with pytest.raises(PlanError, match=r"plan\.json is not as it was written.*modes-fx plan sign"):
        SkipPlan.load(path)
    edited = SkipPlan.load(path, check_digest=False)
    assert edited == dataclasses.replace(plan, points=(POINTS[0], dataclasses.replace(POINTS[1], tau_text=0.7)))
    assert SkipPlan.load(edited.save(path)) == edited


def test_neither_a_lost_digest_nor_a_lower_version_passes_for_an_older_file(path: Path) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "schema_version": 2}))
    with pytest.raises(PlanError, match="digest does not fit"):
        SkipPlan.load(path)
    del content[signed_json.DIGEST]
    path.write_text(json.dumps(content))
    with pytest.raises(PlanError, match="have a digest from schema version 3 on"):
        SkipPlan.load(path)


def test_other_spacing_and_order_are_the_same_content(plan: SkipPlan, path: Path) -> None:
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items())), indent=7))
    assert SkipPlan.load(path) == plan


@pytest.mark.parametrize("content", ["[" * 10**5, '{"schema_version":' * 10**5, '{"schema_version": 3, "points": ' + "[" * 40])
def test_a_deep_file_is_refused_by_name(path: Path, content: str) -> None:
    path.write_text(content + "]" * 40 + "}" if content.endswith("[" * 40) and content[0] == "{" else content)
    with pytest.raises(PlanError, match=r"plan\.json is not a whole JSON file"):
        SkipPlan.load(path)


def test_a_file_beyond_the_size_limit_is_refused_by_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signed_json, "MAX_BYTES", 100)
    with pytest.raises(PlanError, match=r"plan\.json.*more than"):
        SkipPlan.load(path)


@pytest.mark.parametrize("provenance", [{"path": Path("x")}, {"numbers": {1, 2}}])
def test_what_no_file_holds_is_refused_before_it_is_written(path: Path, plan: SkipPlan, provenance: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="JSON values"):
        plan.with_provenance(**provenance).save(path)
    assert SkipPlan.load(path) == plan


def test_an_argument_of_undecodable_bytes_survives_as_text(path: Path, plan: SkipPlan) -> None:
    said = plan.with_provenance(command=["modes-fx", "\udcff.json"])
    assert SkipPlan.load(said.save(path)).provenance["command"] == ["modes-fx", "\\udcff.json"]


def test_more_may_be_said_of_how_a_plan_was_made(plan: SkipPlan) -> None:
    said = plan.with_provenance(seed=4, command=["modes-fx", "search"])
    assert said.provenance == {"seed": 4, "versions": {"torch": "2"}, "command": ["modes-fx", "search"]}
    assert dataclasses.replace(said, provenance=plan.provenance) == plan


def test_a_target_that_is_no_number_is_refused(plan: SkipPlan) -> None:
    with pytest.raises(PlanError, match=r"skip ratio in \[0, 1\], got 'high'"):
        plan.bounds(3, "high")  # type: ignore[arg-type]


def test_an_unknown_target_is_refused_with_the_known_ones(plan: SkipPlan) -> None:
    with pytest.raises(PlanError, match=r"0\.6.*0\.5, 0\.875\.$"):
        dataclasses.replace(plan, frontier=()).point(0.6)
    with pytest.raises(PlanError, match="by hand"):
        SkipPlan.uniform(text=0.1, vision=0.1).point(0.5)


def test_bounds_are_tau_over_alpha_to_the_gamma(plan: SkipPlan) -> None:
    bounds = plan.bounds(3, 0.5)
    assert bounds.dtype is torch.float32
    wanted = [[0.01 / text**0.5, 0.02 / vision**0.5 if vision else INF] for text, vision in ALPHA]
    torch.testing.assert_close(bounds, torch.tensor(wanted))


def test_alpha_of_zero_skips_all() -> None:
    assert SkipPlan((PlanPoint(None, 0.1, 0.1),), ((0.0, 1.0),)).bounds(1).tolist()[0][0] == INF


def test_tau_of_zero_keeps_all_whatever_alpha() -> None:
    for gamma in (0.0, 0.5, 1.0):
        assert SkipPlan((PlanPoint(None, 0.0, 0.0, gamma),), ALPHA).bounds(3).tolist() == [[0.0, 0.0]] * 3


def test_gamma_of_zero_leaves_alpha_out_also_where_it_is_zero() -> None:
    bounds = SkipPlan((PlanPoint(None, 0.25, 0.5, 0.0),), ALPHA).bounds(3)
    assert bounds.tolist() == [[0.25, 0.5]] * 3


def test_uniform_thresholds_stand_directly_on_the_weights() -> None:
    assert SkipPlan.uniform(text=0.25, vision=0.5).bounds(2).tolist() == [[0.25, 0.5]] * 2


def test_reduce_k_bounds_are_k() -> None:
    plan = SkipPlan.reduce_k(3)
    assert (plan.rule, plan.bounds(2).tolist()) == ("reduce_k", [[3.0, 3.0]] * 2)


@pytest.mark.parametrize("value", [math.nan, -0.1, -INF, "0.1", None])
@pytest.mark.parametrize("name", ["tau_text", "tau_vision", "gamma"])
def test_thresholds_that_are_no_number_or_below_zero_are_refused_by_name(name: str, value: Any) -> None:
    arguments = {"target": None, "tau_text": 0.1, "tau_vision": 0.1, "gamma": 1.0, name: value}
    with pytest.raises(PlanError, match=name):
        PlanPoint(**arguments)


@pytest.mark.parametrize("value", [math.nan, -0.1])
def test_uniform_refuses_them_too(value: float) -> None:
    with pytest.raises(PlanError, match="tau_vision"):
        SkipPlan.uniform(text=0.1, vision=value)


@pytest.mark.parametrize("target", [-0.1, 1.5, math.nan])
def test_a_target_outside_of_0_to_1_is_refused(target: float) -> None:
    with pytest.raises(PlanError, match="target"):
        PlanPoint(target, 0.1, 0.1)


@pytest.mark.parametrize(
    "changes",
    [{"points": ()}, {"rule": "magic"}, {"alpha": ((0.1, math.nan),)}, {"alpha": ((0.1, -1.0),)}, {"alpha": ((0.1,),)}],
    ids=["no point", "unknown rule", "alpha NaN", "alpha negative", "alpha for one modality"],
)
def test_a_plan_that_makes_no_sense_is_refused(plan: SkipPlan, changes: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        dataclasses.replace(plan, **changes)


def test_importance_for_another_number_of_layers_is_refused(plan: SkipPlan) -> None:
    with pytest.raises(PlanError, match=r"3 MoE layers.*has 4"):
        plan.bounds(4, 0.5)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.json.*No such file"):
        SkipPlan.load(tmp_path / "none.json")


def test_a_folder_is_no_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="Cannot read"):
        SkipPlan.load(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused_by_name(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content.rstrip()) * share)])
    with pytest.raises(PlanError, match=r"plan\.json is not a whole"):
        SkipPlan.load(path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[1, 2]", b"{}", b"null", b'"text"'])
def test_a_file_that_is_no_plan_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(PlanError, match=r"plan\.json"):
        SkipPlan.load(path)


def test_a_newer_schema_is_refused_with_what_to_do(path: Path) -> None:
    with pytest.raises(PlanError, match=f"version {SCHEMA_VERSION + 1}.*Upgrade"):
        SkipPlan.load(changed(path, schema_version=SCHEMA_VERSION + 1))


@pytest.mark.parametrize(
    "changes",
    [
        {"points": [{"target": 0.5}]},
        {"points": [{"target": 0.5, "tau_text": 0.1, "tau_vision": 0.1, "surprise": 1}]},
        {"points": [{"target": 0.5, "tau_text": -1, "tau_vision": 0.1}]},
        {"points": 3},
        {"points": []},
        {"points": [None]},
        {"frontier": [{"target": None, "tau_text": 0.1, "tau_vision": 0.1}]},
        {"frontier": 3},
        {"mode": "other"},
        {"weights": []},
        {"weights": [[[0.2, 0.1], [0.1, 0.2]]] * 3},
        {"weights": [[["x"], [0.1, 0.2]]] * 3},
        {"alpha": [[0.1, "x"]]},
        {"alpha": 3},
        {"rule": "magic"},
        {"tables": [["x"]]},
        {"tables": [[True]]},
        {"model": 3},
        {"model": {"model_type": [[]]}},
        {"model": {"config": "x"}},
        {"layers": [1]},
        {"points": [{"target": 0.5, "tau_text": 0.1, "tau_vision": 0.1, "realised": {"vision": [[]]}}]},
        {"points": [{"target": True, "tau_text": 0.1, "tau_vision": 0.1}]},
        {"points": [{"target": 0.5, "tau_text": 10**400, "tau_vision": 0.1}]},
        {"provenance": []},
        {"surprise": 1},
        {"schema_version": "1"},
        {"schema_version": True},
        {"schema_version": 0},
    ],
)
def test_a_file_with_other_fields_is_refused_by_name(path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"plan\.json"):
        SkipPlan.load(changed(path, **changes))


def test_a_plan_fits_its_model_in_any_dtype_and_no_other(plan: SkipPlan) -> None:
    plan.check_model(tiny.make(dtype=torch.bfloat16).config)
    with pytest.raises(PlanError, match=r"qwen3_vl_moe.*mixtral.*Calibrate"):
        plan.check_model(tiny.make("mixtral").config)


def test_the_hash_sees_architecture_alone() -> None:
    config = tiny.make().config
    before = config_hash(config)
    config._name_or_path, config.text_config.use_cache = "elsewhere", False
    assert config_hash(config) == before
    config.text_config.num_experts += 1
    assert config_hash(config) != before


def test_a_plan_made_by_hand_fits_any_model() -> None:
    SkipPlan.uniform(text=0.1, vision=0.1).check_model(tiny.make("mixtral").config)
    assert issubclass(PlanError, ModesFxError)
