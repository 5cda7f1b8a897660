"""MoE blocks of a model one by one, on what a forward of the stock model gives to each."""

from typing import Any

import torch
from torch import Tensor, nn

import modes_fx
from modes_fx.models.layers import find_moe_layers
from modes_fx.optimize import optimized_state
from modes_fx.passes.skip_experts import Dispatch
from tests.harness import logits


def assert_blocks_are_unchanged(model: nn.Module, inputs: dict[str, Tensor], dispatch: Dispatch) -> None:
    """Optimise a bfloat16 model, and check that with nothing skipped each block gives what it gave before."""
    calls = moe_calls(model, inputs)
    modes_fx.optimize(model, dispatch=dispatch)
    assert not modes_fx.report(model).rejected, modes_fx.report(model)
    for layer in optimized_state(model).layers:
        args, kwargs, expected = calls[layer.block]
        with torch.no_grad():
            actual = routed(layer.block(*args, **kwargs))
        assert (actual.float() - expected.float()).abs().max() <= 0.02 * expected.float().abs().max(), layer.name


def moe_calls(model: nn.Module, inputs: dict[str, Any]) -> dict[nn.Module, tuple[Any, Any, Tensor]]:
    """Run one forward; return the arguments and the output of each MoE block and experts module."""
    calls = {}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls[module] = args, kwargs, routed(output)

    watched = {module for layer in find_moe_layers(model) for module in (layer.block, layer.experts)}
    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in watched]
    logits(model, inputs)
    for hook in hooks:
        hook.remove()
    return calls


def routed(output: Any) -> Tensor:
    """Return a block's hidden states; some blocks return their router's logits too."""
    return output[0] if isinstance(output, tuple) else output
