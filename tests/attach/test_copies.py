"""What is saved or copied of an optimised model is stock; to whoever asks, it is the model that it was."""

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import modes_fx
from modes_fx.plan import SkipPlan
from tests import tiny
from tests.harness import logits

pytestmark = pytest.mark.usefixtures("without_inductor")

PLAN = SkipPlan.uniform(text=0.25, vision=0.4)
INPUTS = tiny.mixed_batch(seed=5)


def saved_and_loaded(model: nn.Module, folder: Path) -> nn.Module:
    model.save_pretrained(folder)
    return type(tiny.make()).from_pretrained(folder)


def torch_saved(model: nn.Module, folder: Path) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def deep_copied(model: nn.Module, folder: Path) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module, folder: Path) -> nn.Module:
    loaded: nn.Module = pickle.loads(pickle.dumps(model))
    return loaded


def loaded_weights(model: nn.Module, folder: Path) -> nn.Module:
    twin = type(tiny.make())(model.config)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


WAYS_TO_COPY = [saved_and_loaded, torch_saved, deep_copied, pickled, loaded_weights]


@pytest.mark.parametrize("way", WAYS_TO_COPY)
def test_what_is_saved_or_copied_is_stock_and_can_be_optimised(
    optimized_vlm: nn.Module, way: Callable[[nn.Module, Path], nn.Module], tmp_path: Path
) -> None:
    vlm = modes_fx.set_plan(optimized_vlm, PLAN)
    stock, expected = logits(tiny.make(), INPUTS), logits(vlm, INPUTS)
    twin = way(vlm, tmp_path)
    assert not [name for module in twin.modules() for name, value in vars(module).items() if "modes_fx" in name and value]
    assert {type(module) for module in twin.modules()} == {type(module) for module in tiny.make().modules()}
    assert (logits(twin, INPUTS) - stock).abs().max() <= 1e-5
    assert (logits(modes_fx.optimize(twin, PLAN), INPUTS) - expected).abs().max() <= 1e-5
    assert logits(vlm, INPUTS).equal(expected)


def test_to_whoever_asks_it_is_the_model_that_it_was(vlm: nn.Module, tmp_path: Path) -> None:
    stock = type(vlm)
    signature, names = inspect.signature(vlm.forward), list(vlm.state_dict())
    modes_fx.optimize(vlm, PLAN)
    assert inspect.signature(vlm.forward) == signature
    assert vlm.__class__.__name__ == stock.__name__
    assert isinstance(vlm, stock)
    assert isinstance(vlm.model.language_model, transformers.Qwen3VLMoeTextModel)
    assert list(vlm.state_dict()) == names
    assert str(vlm) == str(tiny.make())
    vlm.save_pretrained(tmp_path)
    saved = transformers.AutoConfig.from_pretrained(tmp_path)
    assert saved.architectures == [stock.__name__]
    assert "modes_fx" not in (tmp_path / "config.json").read_text()
    assert type(transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)) is stock
