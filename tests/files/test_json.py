"""Numbers that JSON does not have: there and back."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modes_fx.errors import PlanError
from modes_fx.files import signed_json, strict_json
from modes_fx.plan import PlanPoint, SkipPlan
from modes_fx.policies import RULES, Rule, register

NUMBERS = st.one_of(st.floats(), st.sampled_from([math.inf, -math.inf, math.nan]), st.integers(-9, 9), st.none())
CONTENT = st.recursive(NUMBERS, lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from("abc"), inner), max_leaves=8)


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(content=CONTENT)
def test_any_numbers_come_back(content: Any) -> None:
    read = strict_json.numbers(json.loads(strict_json.dumps(content), parse_constant=refuse))
    assert repr(read) == repr(content)  # NaN equals nothing, and prints as itself


def test_a_plan_keeps_every_number_that_json_does_not_have(tmp_path: Path) -> None:
    register("tabled", Rule(lambda weights_TK, bound_T, table_E: weights_TK > 0, 0.0, 1.0))
    try:
        point = PlanPoint(0.5, 0.1, math.inf, 1.0, {"text": math.nan, "vision": 0.4}, {"calibration": math.inf})
        tables = ((math.inf, -math.inf, 0.5), (1.0, math.nan, 0.0))
        plan = SkipPlan((point,), rule="tabled", tables=tables)
        read = SkipPlan.load(plan.save(tmp_path / "plan.json"))
        assert repr(read) == repr(plan)
        assert repr([table.tolist() for table in read.table_tensors(2)]) == repr([list(table) for table in tables])
    finally:
        del RULES["tabled"]


@pytest.mark.parametrize("value", [math.nan, -1.0, "inf", "ten"])
def test_what_is_no_threshold_is_refused_from_a_file_too(tmp_path: Path, value: Any) -> None:
    path = SkipPlan.uniform(text=0.1, vision=0.2).save(tmp_path / "plan.json")
    content = json.loads(path.read_text())
    content["points"][0]["tau_text"] = value
    path.write_text(strict_json.dumps(signed_json.signed(content)))
    if value == "inf":
        assert SkipPlan.load(path).points[0].tau_text == math.inf
        return
    with pytest.raises(PlanError, match=r"plan\.json.*tau_text"):
        SkipPlan.load(path)
