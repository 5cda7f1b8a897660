"""Experts of families that differ in their work between the GEMMs, in every form of the dispatch."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from tests import harness, oracle, tiny
from tests.passes.conftest import FORMS, form_id
from tests.passes.experts import check_experts
from tests.wide import beyond

HIDDEN = 32


def nemotron_h() -> nn.Module:
    """No gate, squared ReLU."""
    config = transformers.NemotronHConfig(hidden_size=HIDDEN, n_routed_experts=6, moe_intermediate_size=16)
    return _filled(NemotronHExperts(config))


def muse_spark() -> nn.Module:
    """A norm behind the second GEMM."""
    config = transformers.MuseSparkTextConfig(moe_hidden_size=HIDDEN, num_local_experts=6, moe_intermediate_size=16)
    return _filled(MuseSparkExperts(config))


def _filled(experts: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return experts


def _of(family: str) -> Callable[[], nn.Module]:
    return lambda: oracle.experts_of(tiny.make(family))[-1]


EXPERTS = {
    **{family: _of(family) for family in ("qwen3_vl_moe", "deepseek_v3", "gpt_oss")},
    "nemotron_h": nemotron_h,
    "muse_spark": muse_spark,
}


@pytest.mark.parametrize("form", [harness.SORTED, harness.PAIRS])
@pytest.mark.parametrize("family", beyond({"gpt_oss"}, EXPERTS, str))
def test_experts_of_a_family_skip_by_triton_programs(family: str, form: str) -> None:
    pytest.importorskip("triton")
    check_experts(EXPERTS[family](), HIDDEN, "grouped_mm", form, torch.float32, dynamic=form == harness.SORTED)


IN_BFLOAT16 = ("gpt_oss", "muse_spark")
FEW = {"gpt_oss", "nemotron_h"}
CASES = [
    pytest.param(family, form, id=f"{family}-{form_id(form)}", marks=() if family in FEW else pytest.mark.wide)
    for family in EXPERTS
    for form in FORMS
    if form[2] is torch.float32 or family in IN_BFLOAT16
]


@pytest.mark.parametrize(("family", "form"), CASES)
def test_experts_of_a_family_skip_what_its_eager_loop_drops(family: str, form: tuple[str, str, torch.dtype]) -> None:
    """Some in bfloat16 with a fixed number of tokens, and these in float32 with any number in one graph."""
    dynamic = family in IN_BFLOAT16 and form[2] is torch.float32
    check_experts(EXPERTS[family](), HIDDEN, *form, dynamic=dynamic)
