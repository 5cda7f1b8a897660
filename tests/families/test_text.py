"""Every language-model family end to end, without Inductor: compact in float32, static in bfloat16."""

import copy

import pytest
import torch
from torch import Tensor, nn

import modes_fx
from modes_fx.optimize import optimized_state
from tests import oracle
from tests.families.blocks import assert_blocks_are_unchanged
from tests.families.family import Family, outcome
from tests.families.text import TEXT
from tests.harness import logits, plan_of, relative_error
from tests.wide import FAMILIES, beyond

pytestmark = pytest.mark.usefixtures("without_inductor")

ROUNDED = {"zaya"}  # stock's own float32 logits are 7e-6 off: two such roundings add up to more than 1e-5

REWRITTEN = [family for family in TEXT if family.expected == "rewritten"]


@pytest.mark.parametrize("family", beyond(FAMILIES, REWRITTEN, lambda family: family.name))
def test_family_is_rewritten_and_skips_what_the_oracle_skips(family: Family) -> None:
    stock, inputs = family.build(), family.inputs()
    model, unskipped = copy.deepcopy(stock), logits(stock, inputs)
    assert outcome(model) == family.expected
    assert modes_fx.report(model).found == len(oracle.experts_of(stock))
    assert_regions_are_nested(model)
    classes = random_classes(inputs)
    real = classes != 2
    exact = in_float64(stock, inputs) if family.name in ROUNDED else unskipped
    assert relative_error(logits(model, inputs), exact, real) <= 1e-5

    bounds = oracle.random_bounds(stock, classes, seed=7, **inputs)
    wanted = oracle.Oracle(stock, bounds)
    expected = wanted(classes, **inputs, use_cache=False).logits
    modes_fx.set_plan(model, plan_of(bounds))
    with modes_fx.stats(model) as stats, modes_fx.token_modality(classes):
        actual = logits(model, inputs)
    assert relative_error(actual, expected, real) <= 2e-5
    assert relative_error(actual, unskipped, real) > 1e-3  # it did skip something that matters
    assert stats.pairs_kept.equal(wanted.kept)
    assert stats.pairs_routed.equal(wanted.routed)


def in_float64(stock: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    exact = copy.deepcopy(stock).double()
    exact.set_experts_implementation("eager")
    return logits(exact, inputs).float()


@pytest.mark.slow
@pytest.mark.parametrize("family", REWRITTEN, ids=lambda family: family.name)
def test_blocks_are_unchanged_in_bfloat16(family: Family) -> None:
    assert_blocks_are_unchanged(family.build().to(torch.bfloat16), family.inputs(), dispatch="static")


@pytest.mark.parametrize("family", [item for item in TEXT if item not in REWRITTEN], ids=lambda family: family.name)
def test_family_with_a_loop_is_converted_or_refused_by_name(family: Family) -> None:
    model, inputs = family.build(), family.inputs()
    stock = logits(model, inputs)
    assert not oracle.experts_of(model)
    assert outcome(model) == family.expected
    assert relative_error(logits(model, inputs), stock, torch.ones(stock.shape[:2]) == 1) <= 1e-5


def test_top_k_of_a_block_that_takes_more_than_hidden_states_is_known_from_the_first_forward_on() -> None:
    family = next(item for item in TEXT if item.name == "deepseek_v4")  # its first layer routes by token id
    model = modes_fx.optimize(family.build())
    assert [site.top_k for site in modes_fx.report(model).sites] == [0, 3, 3]
    logits(model, family.inputs())
    assert [site.top_k for site in modes_fx.report(model).sites] == [3, 3, 3]


def assert_regions_are_nested(model: nn.Module) -> None:
    """Check that each MoE layer was placed: experts in a block in a decoder layer in the list that a stack runs through."""
    layers = optimized_state(model).layers
    for layer in layers:
        for inner, outer in ((layer.experts, layer.block), (layer.block, layer.layer)):
            assert any(inner is module for module in outer.modules())
        lists = [child for child in layer.stack.children() if isinstance(child, nn.ModuleList)]
        assert sum(layer.layer is item for items in lists for item in items) == 1
    assert len({layer.stack for layer in layers}) == 1
    assert len({layer.layer for layer in layers}) == len(layers)


def random_classes(inputs: dict[str, Tensor]) -> Tensor:
    """Return int64 [B, S]: the tokens of a text model as text, vision and one of padding, at random."""
    classes = torch.randint(2, inputs["input_ids"].shape, generator=torch.Generator().manual_seed(1))
    classes[0, 0] = 2
    return classes
