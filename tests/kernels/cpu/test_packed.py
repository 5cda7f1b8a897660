"""Packed weights compute as the weights that they stand for, and give them back whole."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import modes_fx
from modes_fx.errors import ModelError
from modes_fx.kernels.cpu import packed
from modes_fx.kernels.cpu.packed import PackedWeight, Packing
from tests import harness, tiny
from tests.kernels.cpu.test_ops import assert_close, randn, routing

ops = torch.ops.modes_fx
pytestmark = pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="oneDNN's bfloat16 kernels need AVX-512")


class Experts(nn.Module):
    def __init__(self, experts: int = 3, inner: int = 40, outer: int = 64) -> None:
        super().__init__()
        self.up = nn.Parameter(randn(experts, outer, inner, dtype=torch.bfloat16))
        self.odd = nn.Parameter(randn(experts, 30, inner, dtype=torch.bfloat16))
        self.scale = nn.Parameter(torch.ones(3))
        self.is_transposed = False


@pytest.fixture
def experts() -> Experts:
    return Experts()


@pytest.fixture
def packing(experts: Experts) -> Packing:
    packing = Packing()
    packing.pack([experts])
    return packing


@pytest.mark.parametrize(("tokens", "top_k"), [(5, 2), (1, 3), (0, 2), (200, 1)])
@pytest.mark.usefixtures("threads")
def test_the_packed_kernels_compute_what_the_others_do(tokens: int, top_k: int) -> None:
    module = Experts()
    weight = module.up.detach().clone()
    Packing().pack([module])
    blocks = module.up.blocks
    ids, pairs, offsets = routing(tokens, top_k, 3)
    x, rows = randn(tokens, 40, dtype=torch.bfloat16), randn(len(pairs), 40, dtype=torch.bfloat16)
    gathered = ops.linear_packed(x, pairs, top_k, blocks, offsets)
    given = ops.linear_packed(x[pairs // top_k], None, top_k, blocks, offsets)
    weights = randn(len(pairs))
    summed = ops.linear_combine_packed(rows, pairs, top_k, weights, blocks, offsets, tokens)
    assert_close(gathered, torch.einsum("rd,rnd->rn", x[pairs // top_k].double(), weight[ids[pairs]].double()), torch.bfloat16)
    assert given.equal(gathered)
    assert_close(summed, ops.linear_combine(rows, pairs, top_k, weights, weight, offsets, tokens).double(), torch.float32)


def test_they_are_well_behaved_operations(experts: Experts, packing: Packing) -> None:
    _, pairs, offsets = routing(5, 2, 3)
    x, rows = randn(5, 40, dtype=torch.bfloat16), randn(len(pairs), 40, dtype=torch.bfloat16)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    combined = (rows, pairs, 2, randn(len(pairs)), experts.up.blocks, offsets, 5)
    torch.library.opcheck(
        torch.ops.modes_fx.linear_packed.default, (x, pairs, 2, experts.up.blocks, offsets), test_utils=checks
    )
    torch.library.opcheck(torch.ops.modes_fx.linear_combine_packed.default, combined, test_utils=checks)


def test_blocks_take_the_place_of_the_weights_and_give_them_back(experts: Experts) -> None:
    wanted = {name: value.clone() for name, value in experts.state_dict().items()}
    parameters = dict(experts.named_parameters())
    packing = Packing()
    packing.pack([experts])
    assert isinstance(experts.up, PackedWeight)
    assert experts.up.blocks.untyped_storage().nbytes() == wanted["up"].nbytes
    assert parameters["up"].untyped_storage().nbytes() == 0
    assert experts.odd is parameters["odd"], "30 columns fill no block"
    assert all(value.equal(wanted[name]) and type(value) is Tensor for name, value in experts.state_dict().items())
    packing.undo()
    assert all(value is parameters[name] for name, value in experts.named_parameters())
    assert all(value.equal(wanted[name]) for name, value in experts.state_dict().items())
    assert not experts._state_dict_hooks


def test_tied_weights_are_packed_once_and_stay_tied(experts: Experts) -> None:
    other, weight, parameter = Experts(), experts.up.detach().clone(), experts.up
    other.up = experts.up
    packing = Packing()
    packing.pack([experts, other])
    assert other.up is experts.up
    packing.undo()
    assert experts.up is other.up is parameter
    assert parameter.equal(weight)


def test_weights_turned_and_tied_are_saved_as_they_were(experts: Experts) -> None:
    other = Experts()
    experts.is_transposed = other.is_transposed = True
    other.up = experts.up
    packing = Packing()
    packing.pack([experts, other])
    assert all(value.is_contiguous() for value in other.state_dict().values())
    packing.undo()
    assert other.up is experts.up
    assert other.up.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_stored_transposed_are_turned_and_turned_back(experts: Experts, dtype: torch.dtype) -> None:
    experts.is_transposed = True
    experts.to(dtype)
    wanted, parameters = {name: value.clone() for name, value in experts.state_dict().items()}, dict(experts.named_parameters())
    packing = Packing()
    packing.pack([experts])
    assert experts.up.mT.is_contiguous()
    assert experts.odd.mT.is_contiguous()
    assert all(value is parameters[name] for name, value in experts.named_parameters())
    assert all(value.equal(wanted[name]) and value.is_contiguous() for name, value in experts.state_dict().items())
    packing.undo()
    assert all(value.equal(wanted[name]) and value.is_contiguous() for name, value in experts.named_parameters())
    assert not experts._state_dict_hooks


def test_weights_that_were_cast_since_are_left_as_they_are(experts: Experts) -> None:
    weight = experts.up.detach().float()
    packing = Packing()
    packing.pack([experts])
    experts.float()
    packing.undo()
    assert experts.up.equal(weight)


def test_an_interruption_loses_nothing(experts: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    second = Experts()
    wanted = {name: value.clone() for name, value in (experts.state_dict() | {"second": second.up}).items()}
    packing, made = Packing(), packed._blocks_of
    calls: list[Tensor] = []

    def interrupted(weight: Tensor) -> Tensor:
        calls.append(weight)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return made(weight)

    monkeypatch.setattr(packed, "_blocks_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packing.pack([experts, second])
    packing.undo()
    found = experts.state_dict() | {"second": second.up}
    assert all(value.equal(wanted[name]) for name, value in found.items())


def test_any_other_operation_sees_the_weight_itself(experts: Experts) -> None:
    weight = experts.up.detach().clone()
    Packing().pack([experts])
    assert (experts.up + 1).equal(weight + 1)
    assert experts.up[1].equal(weight[1])
    assert copy.deepcopy(experts).up.equal(weight)
    assert type(copy.deepcopy(experts).up) is nn.Parameter
    with pytest.raises(ModelError, match=r"would change weights that are packed.*restore"):
        experts.up.detach().zero_()


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ModelError, match="found no weight to pack"):
        Packing().pack([Experts().float()])


@pytest.mark.parametrize(("family", "gemms"), [("qwen3_vl_moe", "packed kernels"), ("gpt_oss", "kernels")])
def test_a_model_with_packed_weights_skips_the_same_and_saves_the_same(
    family: str, gemms: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    harness.compile_with(monkeypatch, harness.uncompiled)
    stock = tiny.make(family, torch.bfloat16)
    model, inputs = copy.deepcopy(stock), tiny.mixed_batch()
    inputs = inputs if family == "qwen3_vl_moe" else {"input_ids": inputs["input_ids"]}
    plan = modes_fx.SkipPlan.uniform(text=0.3, vision=0.4)
    wanted = harness.logits(modes_fx.optimize(stock, plan), inputs)
    state = harness.model_state(model)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    modes_fx.optimize(model, plan, prepack=True)
    logits = harness.logits(model, inputs)
    assert {site.gemms for site in modes_fx.report(model).sites} == {gemms}
    assert (logits - wanted).abs().max() <= 0.02 * wanted.abs().max()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(value.equal(saved[name]) for name, value in again.state_dict().items())
    modes_fx.restore(model)
    assert harness.model_state(model) == state
    assert all(value.equal(saved[name]) and value.is_contiguous() for name, value in model.state_dict().items())
