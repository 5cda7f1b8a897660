"""Trace every MoE block once, on two tokens and without Inductor, to know each site's fate before anything is compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from modes_fx.backend import Compiled, SkipBackend
from modes_fx.errors import ModelError
from modes_fx.experts import stock_dispatch
from modes_fx.passes.site import Reject, SiteRecord
from modes_fx.passes.skip_experts import Dispatch
from modes_fx.regions import MoeLayer, compiled_caller, has_accelerate_hooks
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
        candidates = (layer.experts,) if has_accelerate_hooks(layer.block) else (layer.block, layer.experts)
        for module in dict.fromkeys(candidates):
            kind = type(module)
            if kind not in callers:
                backend = SkipBackend(runtime, runtime.rule.keep, dispatch, _run_uncompiled)
                hooked = has_accelerate_hooks(module)  # the hooks run outside of what is compiled
                callers[kind] = compiled_caller(backend, stock_dispatch) if hooked else compiled_caller(backend)
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
                refusals[kind] = SiteRecord("", layer.name, "rejected", "NOT_TRACEABLE", _reason(error))
            if index in runtime.sites:
                if module is layer.experts:  # it was given one expert a token; what its router chooses the first forward shows
                    runtime.sites[index] = replace(runtime.sites[index], top_k=0)
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
    if any(isinstance(value, Tensor) and value.device.type == "meta" for value in inputs):
        # No weights: shapes are all there is, and the number of kept pairs depends on data.
        return lambda *values: fx.node.map_arg(_results(module), lambda node: _like(node.meta["example_value"]))
    return module.forward


def _results(module: fx.GraphModule) -> Any:
    return next(node for node in module.graph.nodes if node.op == "output").args[0]


def _like(value: Any) -> Any:
    """Return an empty tensor of a fake one's shape; a length that no input tells is 0."""
    if not isinstance(value, Tensor):
        return value
    shape = [size if isinstance(size, int) else size.node.hint or 0 for size in value.shape]
    return torch.empty(shape, dtype=value.dtype, device=value.device)


def _check_stand_in(layer: MoeLayer, output: Any) -> None:
    """Compare a converted block with the model's own, which works on the same weights.

    NOTE [why by what it computes] Remote code of one structure can route in different ways; following it by reading its
    source would be a guess.

    Raises:
        Reject: ``COMPUTES_OTHERWISE``.
    """
    tokens = _two_tokens(layer, layer.block)
    if tokens[0].device.type == "meta":
        return  # nothing is computed
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


def _reason(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, ModelError) and error.__cause__ else error  # dynamo's, without our advice
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or ["no message"]
    context = [line.partition(": ")[2] for line in lines if line.startswith("Developer debug context: ")]
    return f"{type(cause).__name__}: {'; '.join((lines[0], *context))}"
