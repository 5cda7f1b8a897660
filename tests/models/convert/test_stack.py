"""Stacked weights are the model's own: no second copy, loaded in place, given back; and found out when they are replaced."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import modes_fx
from modes_fx.errors import NotOptimizedError
from modes_fx.models.convert.conversions import Conversions
from modes_fx.models.layers import find_moe_layers
from tests import tiny
from tests.harness import logits, relative_error
from tests.models.convert.cases import CASES

pytestmark = pytest.mark.usefixtures("without_inductor")

INPUTS = tiny.text_batch()
REAL = torch.ones(2, 9, dtype=torch.bool)


@pytest.fixture
def model() -> nn.Module:
    return CASES["deepseek"].make()


class Memory(TorchDispatchMode):
    """Counts the bytes of all storages that are alive: a model's, and those made by operations inside the ``with`` block."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        for tensor in model.state_dict().values():
            self._note(tensor)
        self.start = self.peak = self.now

    @property
    def now(self) -> int:
        return sum(size for reference, size in self._storages.values() if not reference.expired())

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        self._storages[reference.cdata] = reference, storage.nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, Tensor):
                self._note(item)
        self.peak = max(self.peak, self.now)
        return result


def test_no_more_than_one_layer_is_held_twice_and_none_afterwards(model: nn.Module) -> None:
    block = CASES["deepseek"].blocks(model)[0]
    layer = sum(parameter.nbytes for parameter in block.experts.parameters())
    conversions = Conversions()
    with Memory(model) as memory:
        converted, refused = conversions.convert(find_moe_layers(model))
        assert not refused
        assert len(converted) == len(conversions) == 2
        assert memory.now == memory.start
        assert memory.start < memory.peak <= memory.start + layer
        memory.peak = memory.now
        conversions.undo()
        assert memory.now == memory.start
        assert memory.peak <= memory.start + layer


def test_weights_loaded_in_place_are_used(model: nn.Module) -> None:
    modes_fx.optimize(model)
    logits(model, INPUTS)
    other = CASES["deepseek"].make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    model.load_state_dict(other.state_dict())
    assert relative_error(logits(model, INPUTS), logits(other, INPUTS), REAL) <= 1e-5
    modes_fx.restore(model)
    assert logits(model, INPUTS).equal(logits(other, INPUTS))


def _assigned(model: nn.Module) -> None:
    state = {name: 0.9 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _one_replaced(model: nn.Module) -> None:
    up = CASES["deepseek"].blocks(model)[1].experts[5].up_proj
    up.weight = nn.Parameter(0.9 * up.weight.detach())


@pytest.mark.parametrize("change", [_assigned, _one_replaced, lambda model: model.to(torch.float64)])
def test_weights_that_were_replaced_or_moved_are_an_error_and_survive_restore(model: nn.Module, change: Any) -> None:
    modes_fx.optimize(model)
    logits(model, INPUTS)
    change(model)
    changed = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(NotOptimizedError, match=r"moved or replaced after optimize\(\).*modes_fx\.restore"):
        logits(model, INPUTS)
    stock = logits(modes_fx.restore(model), INPUTS)
    assert all(value.equal(changed[name]) for name, value in model.state_dict().items())
    assert relative_error(logits(modes_fx.optimize(model), INPUTS), stock, REAL) <= 1e-5


def test_stacked_experts_of_the_models_own_may_be_replaced() -> None:
    model = CASES["step3p7"].make()
    stock = logits(modes_fx.optimize(model), INPUTS)
    _assigned(model)
    changed = logits(model, INPUTS)
    modes_fx.restore(model)
    assert relative_error(changed, logits(model, INPUTS), REAL) <= 1e-5
    assert not changed.equal(stock)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_a_copy_is_a_stock_model_and_can_be_optimised(model: nn.Module, duplicate: Any) -> None:
    stock = logits(model, INPUTS)
    modes_fx.optimize(model)
    twin = duplicate(model)
    assert logits(twin, INPUTS).equal(stock)
    with pytest.raises(NotOptimizedError):
        modes_fx.report(twin)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert relative_error(logits(model, INPUTS), stock, REAL) <= 1e-5


def test_a_saved_model_holds_the_models_own_names_and_values(model: nn.Module, tmp_path: Path) -> None:
    stock = {name: value.clone() for name, value in model.state_dict().items()}
    modes_fx.optimize(model).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {name for name in saved if ".experts." in name} == {name for name in stock if ".experts." in name}
    assert all(value.equal(stock[name]) for name, value in saved.items())


def test_converted_blocks_do_not_train(model: nn.Module) -> None:
    modes_fx.optimize(model)
    with pytest.raises(NotOptimizedError, match=r"inference.*model\.eval\(\)"):
        logits(model.train(), INPUTS)
    logits(model.eval(), INPUTS)


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("region", ["layer", "model"])
def test_a_larger_region_takes_the_stand_ins_in(model: nn.Module, region: str) -> None:
    plan = modes_fx.SkipPlan.uniform(text=0.25, vision=0.4)
    with modes_fx.stats(modes_fx.optimize(model, plan)) as by_block:
        wanted = logits(model, INPUTS)
    with modes_fx.stats(modes_fx.optimize(model, plan, region=region)) as stats:
        actual = logits(model, INPUTS)
    assert 0 < stats.skip_ratio() < 1
    assert stats.pairs_kept.equal(by_block.pairs_kept)
    assert (actual - wanted).abs().max() <= 1e-5


@pytest.fixture(params=["deepseek", "longcat_flash"])
def calibrated(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    return CASES[request.param].make()


def test_calibration_sees_the_routers_weights(calibrated: nn.Module) -> None:
    from modes_fx.calib.routing import RoutingRecorder

    stock = logits(calibrated, INPUTS)
    modes_fx.optimize(calibrated)
    with RoutingRecorder(calibrated) as recorder:
        assert relative_error(logits(calibrated, INPUTS), stock, REAL) <= 1e-5
    by_layer = recorder.counts[:, 0]
    assert by_layer.sum(dim=1).tolist() == [recorder.pairs[0] // 2] * 2
    scores, pairs = recorder.scores(0, [1.0, 1.0])
    assert int(pairs.sum()) == recorder.pairs[0] > 0
    assert bool(torch.isfinite(scores).all())
    assert float(scores[-1]) > 0
