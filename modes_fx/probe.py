"""Trace every MoE block once, on two tokens and without Inductor, to know each site's fate before anything is compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from modes_fx.backend import Compiled, SkipBackend
from modes_fx.experts import stock_dispatch
from modes_fx.passes.site import SiteRecord
from modes_fx.passes.skip_experts import Dispatch
from modes_fx.regions import MoeLayer, compiled_caller, has_accelerate_hooks
from modes_fx.runtime import ModelRuntime


def probe(
    layers: Sequence[MoeLayer], runtime: ModelRuntime, dispatch: Dispatch
) -> tuple[list[MoeLayer], dict[int, SiteRecord]]:
    """Run each layer's block, or its experts module where the block cannot be traced alone, through the pass.

    Args:
        layers: The model's MoE layers.
        runtime: Learns the rewritten sites (``runtime.sites``).
        dispatch: See ``skip_experts``.

    Returns:
        The layers, each with the block that can be compiled; and the reason for each layer that cannot be rewritten.
    """
    callers: dict[type, Any] = {}  # blocks of one class share a traced graph, as they will when compiled
    refusals: dict[type, SiteRecord] = {}
    probed, rejected = [], {}
    for index, layer in enumerate(layers):
        candidates = (layer.experts,) if has_accelerate_hooks(layer.block) else (layer.block, layer.experts)
        for module in dict.fromkeys(candidates):
            kind = type(module)
            if kind not in callers:
                backend = SkipBackend(runtime, runtime.rule.keep, dispatch, _run_uncompiled)
                alone = module is layer.experts
                callers[kind] = compiled_caller(backend, stock_dispatch) if alone else compiled_caller(backend)
            try:
                with torch.no_grad():
                    callers[kind](module, *_two_tokens(layer, module))
            except Exception as error:  # whatever a model's code raises is the reason, and is reported
                refusals[kind] = SiteRecord("", layer.name, "rejected", "NOT_TRACEABLE", _first_line(error))
            if index in runtime.sites:
                layer = replace(layer, block=module)
                break
            if runtime.rejections:
                refusals[kind] = runtime.rejections[-1]
        else:
            nothing = SiteRecord("", layer.name, "rejected", "NO_DISPATCH", "the traced block holds no expert dispatch")
            rejected[index] = refusals.get(type(layer.experts), nothing)
        probed.append(layer)
    runtime.graphs = 0
    return probed, rejected


def _run_uncompiled(module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Compiled:
    return module.forward


def _two_tokens(layer: MoeLayer, module: nn.Module) -> tuple[Tensor, ...]:
    weight = next(iter(layer.experts.parameters()))
    hidden = torch.zeros(2, layer.hidden_size, dtype=weight.dtype, device=weight.device)
    if module is not layer.experts:
        return (hidden.unsqueeze(0),)
    ids = torch.zeros(2, 1, dtype=torch.int64, device=weight.device)
    return hidden, ids, torch.ones(2, 1, dtype=weight.dtype, device=weight.device)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
