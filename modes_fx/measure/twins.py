"""Copies of a model that share its weights, in the settings that users have; what times are measured in."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from modes_fx.errors import ModelError
from modes_fx.graph.code import own_code
from modes_fx.models.layers import Region, find_moe_layers

OURS = "modes-fx"
RECOMPILE_LIMIT = 64  # for stock: torch's own lets it run uncompiled without a word, once its layers are more than 8
_COMPILED = {
    "moe": "MoE blocks", "layer": "decoder layers", "model": "all layers as one", "graph": "whole over a static cache",
    "generate": "static cache",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """How a model is run.

    Attributes:
        experts: Implementation of its experts: one of stock transformers, or ``OURS``; None: as the model was loaded.
        compiled: What of it ``torch.compile`` compiles, each in place; ``"graph"``: its whole call as one graph, for decoding
            over a static cache, as ``generate`` does by itself; ``"generate"``: what that compiles itself over a static cache.
        attention: Implementation of its attention; None: as the model was loaded.
    """

    experts: str | None = None
    compiled: Region | Literal["graph", "generate"] | None = None
    attention: str | None = None

    def __str__(self) -> str:
        if self.experts == OURS and self.compiled in get_args(Region):
            what = "" if self.compiled == "moe" else f', region="{self.compiled}"'
        else:
            what = f", {_COMPILED[self.compiled]} compiled" if self.compiled else ""
        attention = f", {self.attention} attention" if self.attention else ""
        return f"{self.experts or 'as loaded'}{what}{attention}"


# Not batched_mm, which copies weights for each pair: a long prompt's do not fit into memory. Not the loop compiled: it asks the
# device which experts have tokens, so that dynamo makes graphs by expert and by length.
STOCK_SETTINGS = (
    Setting("eager"), Setting("grouped_mm"), Setting("grouped_mm", "moe"), Setting("grouped_mm", "layer"),
    Setting("grouped_mm", "model"),
)  # fmt: skip
STOCK_STATIC = Setting("grouped_mm", "generate")
OUR_SETTINGS = (Setting(OURS, "moe"), Setting(OURS, "layer"), Setting(OURS, "model"))
OUR_STATIC = Setting(OURS, "generate")


def our_settings(model: nn.Module) -> Sequence[Setting]:
    """Return the settings of modes-fx to try: the regions of ``optimize``, and what ``generate`` compiles by itself."""
    return (*OUR_SETTINGS, OUR_STATIC) if compiles_itself(model) else OUR_SETTINGS


def stock_settings(model: nn.Module) -> Sequence[Setting]:
    """Return the settings of stock to try: those of the experts only where the model's go through transformers' interface."""
    settings = (*STOCK_SETTINGS, STOCK_STATIC) if compiles_itself(model) else STOCK_SETTINGS
    if _owners_of_experts(model):
        return settings
    return tuple(dict.fromkeys(Setting(None, setting.compiled) for setting in settings))


def compiles_itself(model: nn.Module) -> bool:
    """Return whether ``generate`` compiles this model over a static cache by itself: where all of it is on GPUs."""
    return {parameter.device.type for parameter in model.parameters()} == {"cuda"}


def stock_twin(model: nn.Module, setting: Setting) -> nn.Module:
    """Return a copy of a model in a stock setting, which shares its weights."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin: Any = copy.deepcopy(model, shared)
    if setting.experts is not None:
        _set_experts(twin, setting.experts)
    if setting.attention is not None:
        twin.set_attn_implementation(setting.attention)
    if setting.compiled == "graph":
        return as_one_graph(twin)
    if setting.compiled is not None and setting.compiled != "generate":
        regions = {id(region): region for layer in find_moe_layers(twin) if (region := layer.region(setting.compiled))}
        caller = _own_caller()
        for region in regions.values():
            # A decoder layer's graph holds its index: a cache for each, so that none is searched for among those of all.
            call = caller if setting.compiled == "moe" else _own_caller()
            region._compiled_call_impl = types.MethodType(call, region)
    stock: nn.Module = twin
    return stock


def _set_experts(model: Any, name: str) -> None:
    """Choose what computes a model's experts.

    Raises:
        ModelError: They do not go through transformers' interface.
        ValueError: transformers knows no such implementation.
    """
    owners = _owners_of_experts(model)
    if not owners:
        raise ModelError(f"What computes the experts of {type(model).__name__} cannot be chosen: none is {name!r}.")
    try:
        model.set_experts_implementation(name)
    except ValueError:  # its class may refuse for the text model it holds, as InternVL's does
        for owner in owners:
            owner.set_experts_implementation(name)


def _owners_of_experts(model: nn.Module) -> list[Any]:
    """Return the models, of a model and those within it, whose config says what computes its experts."""
    experts = [layer.experts for layer in find_moe_layers(model) if layer.form is None]
    configs = {id(config) for each in experts if (config := getattr(each, "config", None)) is not None}
    owners = (module for module in model.modules() if hasattr(module, "set_experts_implementation"))
    return [owner for owner in owners if id(getattr(owner, "config", None)) in configs]


def as_one_graph(model: nn.Module) -> nn.Module:
    """Return a model whose whole call is compiled as one graph of fixed sizes; on a GPU as CUDA graphs, like ``generate``."""
    mode = "reduce-overhead" if compiles_itself(model) else None
    compiled: nn.Module = torch.compile(model, fullgraph=True, dynamic=False, mode=mode)  # type: ignore[assignment]
    return compiled


def _own_caller() -> Callable[..., Any]:
    """Return ``module(...)``, compiled, with a cache of graphs of its own."""

    def call_stock(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    compiled: Callable[..., Any] = torch.compile(own_code(call_stock))
    return compiled
