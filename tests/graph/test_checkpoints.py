"""Training with gradient checkpointing: layers run again in the backward pass, outside of the forward that they belong to."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modes_fx
from modes_fx.plan import SkipPlan
from tests import tiny
from tests.harness import model_state

pytestmark = [
    pytest.mark.usefixtures("without_inductor"),
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    ),  # dynamo's own look at it
]

PLAN = SkipPlan.uniform(text=0.25, vision=0.4)


def gradients(model: nn.Module, *batches: dict[str, Tensor]) -> list[Tensor]:
    """Run all forwards, then one backward."""
    model.zero_grad()
    sum(model(**inputs, use_cache=False).logits.square().mean() for inputs in batches).backward()  # type: ignore[union-attr]
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("first", ["optimize", "checkpointing"])
def test_checkpoints_give_the_gradients_of_the_same_forwards_without(vlm: nn.Module, reentrant: bool, first: str) -> None:
    batches = tiny.mixed_batch(seed=1), tiny.text_batch(3, 18, seed=2), tiny.mixed_batch(side="right", seed=3)
    modes_fx.optimize(vlm.train(), PLAN)
    wanted = gradients(vlm, *batches)
    modes_fx.restore(vlm)
    settings: dict[str, Any] = {"activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if first == "checkpointing":
        vlm.activation_checkpointing_enable(**settings)
    modes_fx.optimize(vlm, PLAN)
    if first == "optimize":
        vlm.activation_checkpointing_enable(**settings)
    vlm.enable_input_require_grads()
    with modes_fx.stats(vlm) as stats:
        actual = gradients(vlm, *batches)
    assert len(actual) == len(wanted)
    for mine, theirs in zip(actual, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    tokens = sum(int((tiny.classes(inputs) != 2).sum()) for inputs in batches)
    assert int(stats.pairs_routed.sum()) == tokens * 3 * 2  # experts a token, layers: what runs again is not counted again


def test_restore_gives_the_checkpoint_function_back(vlm: nn.Module) -> None:
    vlm.train().activation_checkpointing_enable()
    before, layer = model_state(vlm), vlm.model.language_model.layers[0]
    own = layer._gradient_checkpointing_func
    modes_fx.optimize(vlm, PLAN)
    gradients(vlm, tiny.text_batch())
    assert layer._gradient_checkpointing_func is not own
    modes_fx.restore(vlm)
    assert layer._gradient_checkpointing_func is own
    assert model_state(vlm) == before
    assert torch.is_grad_enabled()
