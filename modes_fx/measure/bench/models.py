"""Layers with random weights, one MoE block of them, their inputs, and where routers send them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from modes_fx.measure.bench.options import Skew
from modes_fx.measure.bench.presets import config_of
from modes_fx.models.layers import find_moe_layers

_CONSTANT = 4.0  # of an input's first element, where routing is skewed: in standard deviations of the others
_SAMPLE = 4096
_STEPS = 60  # the fixed point is within 1% by then


@dataclass(frozen=True)
class Routing:
    """Where one MoE layer's router sent tokens.

    Attributes:
        ids: int64 [T, K].
        weights: float32 [T, K], as dispatched.
    """

    ids: Tensor
    weights: Tensor


class Block(nn.Module):
    """One MoE block as a model of its own, so that ``optimize`` takes it; shares the block's weights."""

    def __init__(self, config: Any, mlp: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.mlp = mlp

    def forward(self, inputs_embeds: Tensor) -> Any:
        """Run the block on [1, T, H]."""
        return self.mlp(inputs_embeds)

    def set_experts_implementation(self, name: str) -> None:
        """Choose how experts are dispatched, as transformers' models do."""
        self.config._experts_implementation = name


def build(preset: str, layers: int, skew: Skew = "uniform", seed: int = 0, device: torch.device | None = None) -> Any:
    """Return a stack of decoder layers in bfloat16, random and ready for inference; on the CPU if no device is named.

    Raises:
        ModesFxError: There is no such preset.
    """
    config = config_of(preset, layers)
    torch.manual_seed(seed)
    with device or torch.device("cpu"):
        stack = AutoModel.from_config(config, dtype=torch.bfloat16).eval()
    stack.set_experts_implementation("grouped_mm")
    if skew == "zipf":
        for layer in find_moe_layers(stack):
            _skew(layer.block, layer.experts)
    return stack


def block_of(stack: Any) -> Block:
    """Return the first MoE block of a stack."""
    return Block(stack.config, find_moe_layers(stack)[0].block)


def draw(tokens: int, hidden_size: int, skew: Skew, seed: int) -> Tensor:
    """Return random inputs, bfloat16 [1, T, H]; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, tokens, hidden_size, generator=generator)
    if skew == "zipf":
        hidden[..., 0] = _CONSTANT
    return hidden.to(torch.bfloat16)


def route(model: nn.Module, arguments: Mapping[str, Any]) -> list[Routing]:
    """Run a stock model; return the routing of each of its MoE layers."""
    found: list[Routing] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, ids, weights = (*args, *kwargs.values())[:3]
        found.append(Routing(ids, weights.float()))

    hooks = [layer.experts.register_forward_pre_hook(note, with_kwargs=True) for layer in find_moe_layers(model)]
    try:
        model(**arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def popularity(routing: Routing, experts: int) -> Tensor:
    """Return each expert's share of the pairs, float32 [E], the largest first."""
    counts = torch.bincount(routing.ids.reshape(-1), minlength=experts).float()
    return (counts / counts.sum()).sort(descending=True).values


def _skew(block: nn.Module, experts: nn.Module) -> None:
    """Let experts be chosen as often as Zipf's law has it (s = 1), as far as no token may choose one twice.

    The router's bias is held by its column for the inputs' first element, which is the same for all tokens: no module of the
    block changes, so that every setting runs it as it is.
    """
    own = {id(parameter) for parameter in experts.parameters()}
    number = next(experts.parameters()).shape[0]
    (router,) = (
        parameter
        for parameter in block.parameters()
        if id(parameter) not in own and parameter.dim() == 2 and parameter.shape[0] == number
    )
    top_k: Any = getattr(block, "top_k", None) or next(module.top_k for module in block.modules() if hasattr(module, "top_k"))
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(_SAMPLE, router.shape[1], generator=generator) @ router.detach().float().cpu().T
    wanted = _at_most_one(1.0 / torch.arange(1, number + 1), top_k)
    bias = torch.zeros(number)
    for _ in range(_STEPS):
        chosen = (logits + bias).topk(top_k).indices
        rate = torch.bincount(chosen.reshape(-1), minlength=number) / _SAMPLE
        bias += 0.3 * logits.std() * (wanted.log() - rate.clamp(min=0.1 / _SAMPLE).log())
    with torch.no_grad():
        router[:, 0] = ((bias - bias.mean()) / _CONSTANT).to(router.device)


def _at_most_one(shares: Tensor, top_k: int) -> Tensor:
    """Scale shares to rates that sum to K, none above .98."""
    rates = shares / shares.sum() * top_k
    for _ in range(_STEPS):
        free = rates < 0.98
        rates = torch.where(free, rates, 0.98)
        rates[free] *= (top_k - 0.98 * int((~free).sum())) / rates[free].sum()
    return rates.clamp(max=0.98)
