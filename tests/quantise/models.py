"""Tiny models that can be quantised to 4 bits, and plain models with the weights that quantised ones stand for."""

import copy

import torch
from torch import nn

from modes_fx.models.layers import find_moe_layers
from modes_fx.quantise import quantise_experts
from tests import oracle, tiny
from tests.families.family import spread

WIDTHS: dict[str, dict[str, int]] = {"gpt_oss": {}}  # its experts' width is the intermediate size, 32


def plain(family: str = "qwen3_vl_moe", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a model whose experts' matrices are multiples of 32 on each side; the same weights every time."""
    torch.manual_seed(sum(map(ord, family)))
    return spread(tiny.FAMILIES[family](**WIDTHS.get(family, {"moe_intermediate_size": 32}))).to(dtype)


def quantised(bits: int, family: str = "qwen3_vl_moe", dtype: torch.dtype = torch.float32) -> nn.Module:
    return quantise_experts(plain(family, dtype), bits)


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the experts' matrices by name."""
    layers = find_moe_layers(model)
    return {
        f"{layer.name}.{name}": weight
        for layer in layers
        for name, weight in layer.experts.named_parameters(recurse=False)
        if weight.dim() == 3
    }


def opened(model: nn.Module, like: nn.Module) -> nn.Module:
    """Return a copy of the plain model ``like`` with the float32 weights that the quantised ones stand for."""
    result = copy.deepcopy(like).float()
    mine = weights_of(result)
    with torch.no_grad():
        for name, weight in weights_of(model).items():
            mine[name].copy_(open_weight(weight))
    return result


def open_weight(weight: torch.Tensor) -> torch.Tensor:
    """Let torchao itself say what a weight stands for: int8 by its own method, int4 by its product with the unit matrix."""
    if type(weight).__name__ == "Int8Tensor":
        return weight.dequantize()
    unit = torch.eye(weight.shape[2], dtype=weight.dtype)
    return torch.stack([torch.nn.functional.linear(unit, weight[expert]).T for expert in range(weight.shape[0])])


def stock_loop(model: nn.Module) -> nn.Module:
    """Return a copy that runs transformers' loop over experts, where torchao multiplies by each expert on its own."""
    result = copy.deepcopy(model)
    result.set_experts_implementation("eager")
    assert len(oracle.experts_of(result)) == len(find_moe_layers(model))
    return result
