"""quantise_experts(): store a model's expert weights in 8 or 4 bits."""

from __future__ import annotations

import logging
from typing import Any, Literal

from torch import nn

from modes_fx.errors import ModelError, NoRoutingSiteError
from modes_fx.graph.experts import site_of
from modes_fx.models.layers import MoeLayer, find_moe_layers, no_moe_layer

logger = logging.getLogger(__name__)

_GROUP_SIZES = (32, 64, 128)


def quantise_experts(model: nn.Module, bits: Literal[8, 4], *, group_size: int = 32) -> nn.Module:
    """Quantise the weights of all routed experts, in place and for good, rounding to nearest; nothing else is quantised.

    The quantised model runs on its own, too, with transformers' ``grouped_mm`` or its loop over experts. Optimise it, and
    calibrate its plan, afterwards.

    Args:
        model: A model on the CPU whose experts use transformers' dispatch, not optimised.
        bits: 8: a scale for each output. 4: a scale and a zero for each ``group_size`` weights of an output; PyTorch's kernel
            for it is fast in bfloat16 and for few rows an expert, as in decoding.
        group_size: 32, 64 or 128; with 8 bits it has no part.

    Returns:
        The same model.

    Raises:
        ModelError: torchao is not installed, the model is optimised, or its experts cannot be stored so. Nothing was changed.
        NoRoutingSiteError: The model has no MoE layer.
    """
    if bits not in (8, 4):
        raise ModelError(f"Experts can be stored in 8 or 4 bits, not {bits}.")
    if group_size not in _GROUP_SIZES:
        raise ModelError(f"A group has {', '.join(map(str, _GROUP_SIZES))} weights, not {group_size}.")
    try:
        from torchao.quantization import Int8Tensor, PerRow

        from modes_fx.quantise.int4 import Int4Experts
    except ImportError as error:
        raise ModelError(f'Quantised experts need torchao ({error}). Install it: pip install "modes-fx[quantise]".') from error

    layers = find_moe_layers(model)
    if not layers:
        raise NoRoutingSiteError(no_moe_layer(model))
    if any(site_of(layer.experts) is not None for layer in layers):
        raise ModelError("The model is optimised. Quantise it first: modes_fx.restore(model), quantise, optimise again.")
    for layer in layers:
        _check(layer, bits, group_size)
    logger.info("%s: storing the experts of %d layers in %d bits", type(model).__name__, len(layers), bits)
    done: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for experts in {id(layer.experts): layer.experts for layer in layers}.values():
        for name, weight in _weights(experts).items():
            if id(weight) not in done:
                data = weight.detach()
                quantised = Int8Tensor.from_hp(data, PerRow()) if bits == 8 else Int4Experts.from_hp(data, group_size)
                done[id(weight)] = nn.Parameter(quantised, requires_grad=False)
            setattr(experts, name, done[id(weight)])
    return model


def _weights(experts: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in experts.named_parameters(recurse=False) if weight.dim() == 3}


def _check(layer: MoeLayer, bits: int, group_size: int) -> None:
    """Refuse experts whose weights cannot be stored in so many bits."""
    experts: Any = layer.experts
    weights = _weights(experts)
    if layer.form is not None or not weights:
        raise ModelError(f"{layer.name} does not hold its experts' weights stacked, as transformers' dispatch has them.")
    for name, weight in weights.items():
        if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.device.type != "cpu":
            kind = f"{type(weight).__name__}, {weight.dtype} on {weight.device}"
            raise ModelError(f"{layer.name}.{name} is {kind}; plain floating-point weights on the CPU can be quantised.")
    if bits == 4 and experts.is_transposed:
        raise ModelError(f"{layer.name} stores its weights transposed, which the 4-bit kernel does not take. Use bits=8.")
    for name, weight in weights.items() if bits == 4 else ():
        _, outputs, inputs = weight.shape
        if inputs % group_size or outputs % 16:
            raise ModelError(
                f"{layer.name}.{name} has {inputs} inputs and {outputs} outputs; in 4 bits these must be multiples of "
                f"{group_size} (group_size) and 16. Use bits=8."
            )
