"""All that ``optimize`` does to a model, step by step, and how it is undone."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

import torch
import torch._dynamo.config
from torch import Tensor, nn
from torch._dynamo import eval_frame

from modes_fx.attach.expert_parallel import ExpertParallel
from modes_fx.attach.probe import probe
from modes_fx.attach.regions import OneLayer, Regions, compiled_block, compiled_module
from modes_fx.attach.watch import Watch
from modes_fx.errors import CompilerError, ModelError
from modes_fx.graph.backend import SkipBackend
from modes_fx.graph.checkpoints import forget_forwards, remember_forwards
from modes_fx.graph.experts import IMPLEMENTATION, Site, attach, dispatch_of, is_expert_parallel, left_in_a_copy
from modes_fx.graph.experts import Dispatch as ExpertsDispatch
from modes_fx.graph.runtime import Runtime
from modes_fx.kernels.cpu.packed import Packing
from modes_fx.models.convert.conversions import Conversions
from modes_fx.models.layers import MoeLayer, Region
from modes_fx.passes.site import Reject, SiteRecord
from modes_fx.passes.skip_experts import Dispatch
from modes_fx.quantise.support import support_quantised
from modes_fx.report import Report, SiteReport

logger = logging.getLogger(__name__)


class Optimized:
    """All that ``optimize`` did to a model, and how to undo it.

    Args:
        model: The model.
        layers: Its MoE layers.
        region: What is compiled in place.
        dispatch: See ``passes.skip_experts``.
        rule: Name of the keep-rule.
    """

    def __init__(self, model: nn.Module, layers: list[MoeLayer], region: Region, dispatch: Dispatch, rule: str) -> None:
        self._model = weakref.ref(model)
        self.region: Region = region
        self.rule = rule
        self.rejections: dict[int, SiteRecord] = {}
        self.runtime = Runtime(layers, rule, dispatch)
        self.model_name = type(model).__name__
        self.watches: list[Watch] = []
        self.parallel: dict[int, ExpertParallel] = {}
        self.regions = Regions(self.runtime)
        self.conversions = Conversions()
        self.packing = Packing()
        self.experts_before: list[tuple[Any, Any]] = []
        self.sites_before: list[tuple[nn.Module, Site | None]] = []
        self.attention_before: list[tuple[Any, str]] = []

    def __reduce__(self) -> Any:
        return left_in_a_copy, ()  # a copied or pickled model is not optimised: compiled regions do not travel

    @property
    def layers(self) -> list[MoeLayer]:
        """The model's MoE layers, as they are now: converted ones with their stand-ins."""
        return cast("list[MoeLayer]", self.runtime.layers)  # which the runtime knows by less

    @layers.setter
    def layers(self, layers: list[MoeLayer]) -> None:
        self.runtime.layers = layers

    @property
    def rewritten(self) -> list[tuple[int, MoeLayer]]:
        """Those whose routing sites are rewritten, with their indices."""
        return [(index, layer) for index, layer in enumerate(self.layers) if index in self.runtime.sites]

    def check(self) -> None:
        """Look at what was done to the model since, at the beginning of a forward.

        One that is to skip is refused if its experts were told to run otherwise; where nothing is to be skipped, they do.
        """
        named = [config._experts_implementation for config, _ in self.experts_before]
        switched = [name for name in named if name != IMPLEMENTATION]
        if switched and not self.runtime.in_force.keeps_all:
            raise ModelError(
                f"The experts of this {self.model_name} were set to {switched[0]!r} after optimize() and would skip nothing. "
                "Call modes_fx.optimize() again to skip, or modes_fx.restore() and then set_experts_implementation() to run "
                "them so."
            )
        if not torch.compiler.is_compiling():
            self.runtime.switched = bool(switched)
            if (model := self._model()) is not None and model.training:
                remember_forwards(model)

    def undo(self) -> None:
        """Give the model back all that it had."""
        if (model := self._model()) is not None:
            forget_forwards(model)
        for watch in reversed(self.watches):
            watch.remove()
        self.regions.remove()
        self.packing.undo()
        for parallel in self.parallel.values():
            parallel.remove()
        for experts, site in self.sites_before:
            attach(experts, site)
        self.conversions.undo()
        for config, implementation in self.experts_before:
            if config._experts_implementation == IMPLEMENTATION:
                config._experts_implementation = implementation
        for config, attention in self.attention_before:
            config._attn_implementation = attention


def trace_sites(model: nn.Module, layers: list[MoeLayer], region: Region, dispatch: Dispatch, rule: str) -> Optimized:
    """Trace every site of a model, for ``optimize`` and ``inspect``; what that changed is changed back by ``undo``.

    Raises:
        CompilerError: torch.compile is switched off.
    """
    _check_dynamo()
    logger.info("%s: tracing %d MoE layers", type(model).__name__, len(layers))
    state = Optimized(model, layers, region, dispatch, rule)
    try:
        state.experts_before = _name_implementation(layers)
        state.layers, state.rejections = state.conversions.convert(layers)
        state.rejections |= support_quantised(layers)
        for index, layer in enumerate(state.layers):
            state.sites_before.append((layer.experts, attach(layer.experts, Site(state.runtime, index, _uncompiled))))
            if is_expert_parallel(layer.experts) and index not in state.rejections:
                _take_apart(state, index)
        state.layers, state.rejections = probe(model, state.layers, state.runtime, state.rejections)
        for index in state.rejections:
            if (block := state.layers[index].stands_for) is not None:
                state.conversions.undo(block)
            attach(state.layers[index].experts, None)
            if (parallel := state.parallel.pop(index, None)) is not None:
                parallel.remove()
            state.layers[index] = layers[index]
    except BaseException:
        state.undo()
        raise
    return state


def _check_dynamo() -> None:
    """Refuse to trace where dynamo runs everything as it is written: no site would be found, and nothing skipped."""
    stance = eval_frame._stance.stance
    if torch._dynamo.config.disable or stance != "default":
        by = "TORCH_COMPILE_DISABLE=1" if torch._dynamo.config.disable else f"torch.compiler.set_stance({stance!r})"
        raise CompilerError(f"torch.compile is switched off by {by}, so that no model can be traced. Undo that first.")


def _take_apart(state: Optimized, index: int) -> None:
    """Decide in front of experts of which each process holds some, if that can be done."""
    layer = state.layers[index]
    try:
        state.parallel[index] = ExpertParallel(layer.experts)
    except Reject as reason:
        state.rejections[index] = SiteRecord("", layer.name, "rejected", reason.code, reason.detail)


def _uncompiled(experts: Any, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    return dispatch_of(experts)(experts, hidden_TH, ids_TK, weights_TK)


def _name_implementation(layers: Sequence[MoeLayer]) -> list[tuple[Any, Any]]:
    """Make the experts run what ``modes_fx.experts`` says; return their configs and what each named before."""
    configs: dict[int, Any] = {
        id(layer.experts.config): layer.experts.config for layer in layers if layer.form is None and layer.stands_for is None
    }
    before = [(config, config._experts_implementation) for config in configs.values()]
    for config in configs.values():
        config._experts_implementation = IMPLEMENTATION
    return before


def compile_regions(state: Optimized, dynamic: bool | None, settings: Mapping[str, Any]) -> None:
    """Compile the regions, and the experts for calls that pass the regions around them by; on the first call of each."""
    weakly = weakref.ref(state.runtime)  # dynamo never lets go of a backend, nor that of the model

    def noted(sites: tuple[SiteRecord, ...]) -> None:
        runtime = weakly()
        if runtime is None:
            return
        runtime.graphs += 1
        for site in sites:
            if site.layer >= 0:
                runtime.sites[site.layer] = site

    backend = SkipBackend(noted, require_site=True, **settings)
    wider: dict[int, nn.Module] = {}
    blocks: dict[type, Callable[..., Any]] = {}  # of one class, which differ by their parameters alone: they share their graphs
    alone: dict[Any, Callable[..., Any]] = {}
    for index, layer in state.rewritten:
        dispatch: ExpertsDispatch = dispatch_of(layer.experts)
        if dispatch not in alone:
            alone[dispatch] = compiled_block(backend, dispatch, dynamic=dynamic)
        call = OneLayer(state.runtime, index, alone[dispatch], decided=index in state.parallel)
        attach(layer.experts, Site(state.runtime, index, call))
        if state.region != "moe":
            module = layer.region(state.region)
            wider[id(module)] = module
        elif layer.block is not layer.experts:
            kind = type(layer.block)
            if kind not in blocks:
                blocks[kind] = compiled_block(backend, dynamic=dynamic)
            state.regions.add_block(index, layer.block, blocks[kind])
    for module in wider.values():
        state.regions.add(module, compiled_module(backend, dynamic=dynamic))


def report_of(state: Optimized) -> Report:
    """Return how each traced site ended."""
    records = [state.runtime.sites.get(i) or state.rejections[i] for i in range(len(state.layers))]
    sites = tuple(_site_report(layer, record) for layer, record in zip(state.layers, records, strict=True))
    return Report(state.model_name, state.region, sites, state.runtime.graphs)


def _site_report(layer: MoeLayer, record: SiteRecord) -> SiteReport:
    found = {item.name: getattr(record, item.name) for item in fields(SiteReport) if item.name != "name"}
    if record.status == "rewritten" and layer.stands_for is not None:
        found["status"] = "converted"
    return SiteReport(layer.name, **found)
