"""Trace every MoE block once, on two tokens and without Inductor, to know each site's fate before anything is compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from modes_fx.attach.regions import compiled_block
from modes_fx.errors import ModelError
from modes_fx.graph.backend import Compiled, SkipBackend, last_sites
from modes_fx.graph.experts import Given, dispatch_of
from modes_fx.graph.runtime import Runtime
from modes_fx.models.layers import MoeLayer, has_accelerate_hooks
from modes_fx.models.sharding import expert_parallel, whole_weights
from modes_fx.passes.site import Reject, SiteRecord
from modes_fx.passes.values import value_of


def probe(
    model: nn.Module, layers: Sequence[MoeLayer], runtime: Runtime, refused: Mapping[int, SiteRecord]
) -> tuple[list[MoeLayer], dict[int, SiteRecord]]:
    """Run each layer's block, or its experts module where the block cannot be traced alone, through the pass.

    Args:
        model: The model.
        layers: Its MoE layers, whose experts know their sites.
        runtime: Learns the rewritten sites (``runtime.sites``).
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
        # What moves weights or tokens runs outside of what is compiled.
        apart = has_accelerate_hooks(layer.block) or expert_parallel(layer.experts) is not None
        candidates = (layer.experts,) if apart else (layer.block, layer.experts)
        for module in dict.fromkeys(candidates):
            kind, site = type(module), None
            if kind not in callers:
                backend = SkipBackend(lambda sites: None, _run_uncompiled)
                callers[kind] = compiled_block(backend, dispatch_of(module)) if apart else compiled_block(backend)
            tokens = _two_tokens(layer, module)
            try:
                with torch.no_grad(), whole_weights(layer.experts, model, layer.stack, layer.layer, layer.block):
                    output, kept = callers[kind](module, _given(layer, runtime, tokens[0].device), *tokens)
                if kept is not None:
                    (site,) = last_sites()
                if layer.stands_for is not None:
                    _check_stand_in(layer, runtime, output if module is layer.block else None)
            except Reject as reason:
                site = SiteRecord("", layer.name, "rejected", reason.code, reason.detail)
            except Exception as error:  # whatever a model's code raises is the reason, and is reported
                site = SiteRecord("", layer.name, "rejected", "NOT_TRACEABLE", _reason(error))
            if site is not None and site.status == "rewritten":
                # Experts alone were given one expert a token; what their router chooses the first forward shows.
                runtime.sites[index] = replace(site, top_k=0) if module is layer.experts else site
                layer = replace(layer, block=module)
                break
            if site is not None:
                refusals[kind] = site
        else:
            nothing = SiteRecord("", layer.name, "rejected", "NO_DISPATCH", "the traced block holds no expert dispatch")
            rejected[index] = refusals.get(type(layer.experts), nothing)
        probed.append(layer)
    return probed, rejected


def _given(layer: MoeLayer, runtime: Runtime, device: torch.device) -> Given:
    """Return what lets a marker keep all pairs of two text tokens."""
    table = runtime.empty_table(layer)
    return (
        torch.zeros(2, dtype=torch.int64, device=device),
        runtime.in_force.bounds[0, 0].to(device),
        None if table is None else table.to(device),
    )


def _run_uncompiled(module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Compiled:
    if any(isinstance(value, Tensor) and value.device.type == "meta" for value in inputs):
        # No weights: shapes are all there is, and the number of kept pairs depends on data.
        return lambda *values: fx.node.map_arg(_results(module), lambda node: _like(value_of(node)))
    return module.forward


def _results(module: fx.GraphModule) -> Any:
    return next(node for node in module.graph.nodes if node.op == "output").args[0]


def _like(value: Any) -> Any:
    """Return an empty tensor of a fake one's shape; a length that no input tells is 0."""
    if not isinstance(value, Tensor):
        return value
    shape = [size if isinstance(size, int) else size.node.hint or 0 for size in value.shape]
    return torch.empty(shape, dtype=value.dtype, device=value.device)


def _check_stand_in(layer: MoeLayer, runtime: Runtime, output: Any) -> None:
    """Compare a converted block with the model's own, which works on the same weights.

    NOTE [why by what it computes] Remote code of one structure can route in different ways; following it by reading its
    source would be a guess.

    Raises:
        Reject: ``COMPUTES_OTHERWISE``.
    """
    tokens = _two_tokens(layer, layer.block)
    if tokens[0].device.type == "meta":
        return  # nothing is computed
    runtime.suspended = True
    try:
        with torch.no_grad():
            wanted = tree_leaves(layer.place.forward(*tokens))
            actual = tree_leaves(layer.block(*tokens) if output is None else output)
    finally:
        runtime.suspended = False
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
    noise = torch.randn(2, layer.hidden_size, generator=torch.Generator().manual_seed(0), device="cpu")
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
