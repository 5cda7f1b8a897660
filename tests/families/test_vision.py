"""Every vision-language family end to end, without Inductor, on text with pictures.

Nothing but the model's own inputs says which tokens are visual. What the oracle is told is written here by hand.
"""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import modes_fx
from tests import oracle
from tests.families.blocks import assert_blocks_are_unchanged
from tests.families.family import Family, outcome
from tests.families.pictures import IMAGE
from tests.families.vision import VISION, WRAPPERS
from tests.harness import logits, plan_of, relative_error
from tests.wide import beyond

pytestmark = pytest.mark.usefixtures("without_inductor")

PREFILL, DECODE = 0, 1
FAMILIES = (*VISION, *WRAPPERS)
COMPUTED = [family for family in FAMILIES if family.expected == "rewritten"]
ORACLE_DTYPE = {"inkling2": torch.float32}  # its router's weights stay in float32, whatever the others are cast to


@pytest.mark.parametrize("family", beyond({"qwen3_vl_moe", "glm4v_moe"}, COMPUTED, lambda family: family.name))
def test_family_is_rewritten_and_skips_what_the_oracle_skips(family: Family) -> None:
    model, inputs = family.build(), family.inputs()
    stock, told, dtype = logits(model, inputs), told_by(inputs), ORACLE_DTYPE.get(family.name, torch.float64)
    bounds = oracle.random_bounds(model, told, seed=7, dtype=dtype, **inputs)
    wanted = oracle.Oracle(model, bounds, dtype)
    expected = wanted(told, **inputs, use_cache=False).logits
    real = inputs["attention_mask"] == 1 if stock.shape[:2] == inputs["input_ids"].shape else torch.ones(stock.shape[:2]) == 1

    dispatching = len(oracle.experts_of(model))
    assert outcome(model) == family.expected
    assert modes_fx.report(model).found == dispatching
    assert relative_error(logits(model, inputs), stock, real) <= 1e-5

    modes_fx.set_plan(model, plan_of(bounds))
    with modes_fx.stats(model) as stats:
        actual = logits(model, inputs)
    assert relative_error(actual, expected, real) <= 2e-5
    assert relative_error(actual, stock, real) > 1e-3  # it did skip something that matters
    assert stats.pairs_kept.equal(wanted.kept)
    assert stats.pairs_routed.equal(wanted.routed)
    assert stats.pairs_routed[:, 1].sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", COMPUTED, ids=lambda family: family.name)
def test_blocks_are_unchanged_in_bfloat16_and_skip_what_is_visual(family: Family) -> None:
    model = in_bfloat16(family.build())
    inputs = {name: value.bfloat16() if value.is_floating_point() else value for name, value in family.inputs().items()}
    assert_blocks_are_unchanged(model, inputs, dispatch="compact")
    modes_fx.set_plan(model, modes_fx.SkipPlan.uniform(text=0.0, vision=float("inf")))
    with modes_fx.stats(model) as stats:
        logits(model, inputs)
    assert (stats.skip_ratio(modality="text"), stats.skip_ratio(modality="vision")) == (0.0, 1.0)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in COMPUTED], ids=lambda family: family.name)
def test_family_is_converted_or_refused_by_name(family: Family) -> None:
    model, inputs = family.build(), family.inputs()
    stock = logits(model, inputs)
    assert outcome(model) == family.expected
    assert relative_error(logits(model, inputs), stock, inputs["attention_mask"] == 1) <= 1e-5
    if family.expected == "converted":
        modes_fx.set_plan(model, modes_fx.SkipPlan.uniform(text=0.0, vision=float("inf")))
        with modes_fx.stats(model) as stats:
            logits(model, inputs)
        assert (stats.skip_ratio(modality="text"), stats.skip_ratio(modality="vision")) == (0.0, 1.0)


def told_by(inputs: dict[str, Tensor]) -> oracle.Told:
    """Tell the oracle what each experts module is called with."""
    ids = inputs["input_ids"]
    groups = inputs.get("moe_mm_token_type_ids")
    visual = ids == IMAGE if groups is None else groups != 0
    classes = torch.where(inputs["attention_mask"] == 0, 2, visual.long()).reshape(-1)
    parts: dict[str, Callable[[int], tuple[Tensor, int]]] = {
        "vision_tower": lambda tokens: (torch.ones(tokens, dtype=torch.int64), PREFILL),
        "vision_moe": lambda tokens: (classes[visual.reshape(-1)], PREFILL),
        "text_moe": lambda tokens: (classes[~visual.reshape(-1)], PREFILL),
        "decoder": lambda tokens: (torch.zeros(tokens, dtype=torch.int64), DECODE),
    }

    def told(name: str, tokens: int) -> tuple[Tensor, int]:
        part = next((part for part in parts if part in name.split(".")), None)
        return parts[part](tokens) if part else (classes, PREFILL)

    return told


def in_bfloat16(model: nn.Module) -> nn.Module:
    """Cast a model as ``from_pretrained`` would: the modules that its class names stay in float32."""
    stays = [pattern for part in model.modules() for pattern in getattr(part, "_keep_in_fp32_modules_strict", None) or ()]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not any(re.search(pattern, name) for pattern in stays):
            tensor.data = tensor.data.bfloat16()
    return model
