"""Trace every MoE block once, on two tokens and without Inductor, to know each site's fate before anything is compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from modes_fx.backend import Compiled, SkipBackend
from modes_fx.passes.site import Reject, SiteRecord
from modes_fx.passes.skip_experts import Dispatch
from modes_fx.regions import MoeLayer, compiled_caller
from modes_fx.runtime import ModelRuntime


def probe(
    layers: Sequence[MoeLayer], runtime: ModelRuntime, dispatch: Dispatch, refused: Mapping[int, SiteRecord]
) -> tuple[list[MoeLayer], dict[int, SiteRecord]]:
    """Run each layer's block, or its experts module where the block cannot be traced alone, through the pass.

    Args:
        layers: The model's MoE layers.
        runtime: Learns the rewritten sites (``runtime.sites``).
        dispatch: See ``skip_experts``.
        refused: Layers that are known not to be rewritten, with the reasons.

    Returns:
        The layers, each with the block that can be compiled; and the reason for each layer that cannot be rewritten.
    """
    callers: dict[type, Any] = {}  # blocks of one class share a traced graph, as they will when compiled
    refusals: dict[type, SiteRecord] = {}
    probed, rejected = [], dict(refused)
    for index, layer in enumerate(layers):
        if index in refused:
            probed.append(layer)
            continue
        for module in dict.fromkeys((layer.block, layer.experts)):
            kind = type(module)
            if kind not in callers:
                backend = SkipBackend(runtime, runtime.rule.keep, dispatch, _run_uncompiled)
                callers[kind] = compiled_caller(backend)
            try:
                with torch.no_grad():
                    output = callers[kind](module, *_two_tokens(layer, module))
                if layer.stands_for is not None:
                    _check_stand_in(layer, output if module is layer.block else None)
            except Reject as reason:
                runtime.sites.pop(index, None)
                refusals[kind] = SiteRecord("", layer.name, "rejected", reason.code, reason.detail)
                runtime.rejections = []
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


def _check_stand_in(layer: MoeLayer, output: Any) -> None:
    """Compare a converted block with the model's own, which works on the same weights.

    NOTE [why by what it computes] Remote code of one structure can route in different ways; following it by reading its
    source would be a guess.

    Raises:
        Reject: ``COMPUTES_OTHERWISE``.
    """
    tokens = _two_tokens(layer, layer.block)
    with torch.no_grad():
        wanted = tree_leaves(layer.place.forward(*tokens))
        actual = tree_leaves(layer.block(*tokens) if output is None else output)
    exact = [item.dtype for item in wanted if isinstance(item, Tensor)] == [torch.float32] * len(wanted)
    same = len(actual) == len(wanted) and all(
        (mine is theirs is None)
        or (mine.shape == theirs.shape and (mine - theirs).abs().max() <= (1e-3 if exact else 0.05) * theirs.abs().max())
        for mine, theirs in zip(actual, wanted, strict=True)
    )
    if not same:
        raise Reject("COMPUTES_OTHERWISE", f"{type(layer.place).__name__} has a known structure, but computes something else")


def _two_tokens(layer: MoeLayer, module: nn.Module) -> tuple[Tensor, ...]:
    weight = next(iter(layer.experts.parameters()))
    noise = torch.randn(2, layer.hidden_size, generator=torch.Generator().manual_seed(0))
    hidden = noise.to(weight.device, weight.dtype)
    if module is not layer.experts:
        return (hidden.unsqueeze(0),)
    ids = torch.zeros(2, 1, dtype=torch.int64, device=weight.device)
    return hidden, ids, torch.ones(2, 1, dtype=weight.dtype, device=weight.device)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
