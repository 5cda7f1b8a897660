"""The experts of every family in both stock dispatches, rewritten in both forms, with fixed and with any number of tokens."""

from itertools import product

import pytest
import torch

import modes_fx
from modes_fx.models.layers import find_moe_layers
from tests import harness
from tests.families.family import Family
from tests.families.text import TEXT
from tests.families.vision import VISION, WRAPPERS
from tests.passes.experts import check_experts

pytestmark = pytest.mark.slow  # tests/passes/test_experts.py runs the same on five families

GEMMS = [("grouped_mm", torch.float32), ("grouped_mm", torch.bfloat16), ("batched_mm", torch.float32)]
FORMS = [*product(GEMMS, ("compact", "static"))]
FAMILIES = [family for family in (*TEXT, *VISION) if family.expected == "rewritten"]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_experts_in_every_form(family: Family) -> None:
    """float32 with any number of tokens in one graph, bfloat16 with a fixed one."""
    kinds = {type(layer.experts): layer for layer in find_moe_layers(family.build())}
    for layer in kinds.values():
        for (stock_form, dtype), dispatch in FORMS:
            dynamic = dtype is torch.float32
            check_experts(layer.experts, layer.hidden_size, stock_form, dispatch, dtype, dynamic=dynamic)


@pytest.mark.parametrize("form", [harness.SORTED, harness.PAIRS])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_experts_by_triton_programs(family: Family, form: str) -> None:
    pytest.importorskip("triton")
    kinds = {type(layer.experts): layer for layer in find_moe_layers(family.build())}
    for layer in kinds.values():
        check_experts(layer.experts, layer.hidden_size, "grouped_mm", form, torch.float32)


ON_ALL_ROWS = {"dbrx": "multiplies the results of two products", "muse_spark": "norms each row behind the last product"}
"""What is left to Inductor between the GEMMs; all else is in the Triton programs."""


@pytest.mark.parametrize(
    "family",
    [family for family in (*TEXT, *VISION, *WRAPPERS) if "reject" not in family.expected],
    ids=lambda family: family.name,
)
def test_what_is_between_the_gemms_is_in_their_programs(family: Family) -> None:
    pytest.importorskip("triton")
    with harness.kernels(harness.SORTED):
        report = modes_fx.report(modes_fx.optimize(family.build(), dispatch="static"))
    wanted = "Triton kernels, and work on all rows between them" if family.name in ON_ALL_ROWS else "Triton kernels"
    assert {site.gemms for site in report.rewritten} == {wanted}
