"""optimize() and what goes with it: choose regions, compile them in place, watch the forward's modality."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from modes_fx.backend import SkipBackend, no_compiler
from modes_fx.budget import Budget, budget_of
from modes_fx.errors import ModelError, ModesFxError, NoRoutingSiteError, NotOptimizedError, PlanError
from modes_fx.modality import ModalityWatch, token_ids_for
from modes_fx.passes.site import SiteRecord
from modes_fx.passes.skip_experts import Dispatch
from modes_fx.plan import SkipPlan
from modes_fx.policy import RULES
from modes_fx.probe import probe
from modes_fx.regions import CompiledRegions, MoeLayer, Region, find_moe_layers
from modes_fx.report import Report, SiteReport, SkipStats
from modes_fx.runtime import ModelRuntime

logger = logging.getLogger(__name__)

_EXPERTS_IMPLEMENTATION = "grouped_mm"


class _Optimized:
    """All that ``optimize`` did to a model, and how to undo it."""

    def __init__(self, model: nn.Module, layers: list[MoeLayer], region: Region, rule: str) -> None:
        self.region: Region = region
        self.rule = rule
        self.layers = layers
        self.rejections: dict[int, SiteRecord] = {}
        self.runtime = ModelRuntime(layers, RULES[rule])
        self.model_name = type(model).__name__
        self.watches: list[ModalityWatch] = []
        self.regions = CompiledRegions()
        self.experts_before: list[tuple[Any, Any]] = []

    def __reduce__(self) -> Any:
        return type(None), ()  # a copied or pickled model is not optimised: compiled regions do not travel

    def undo(self) -> None:
        for watch in self.watches:
            watch.remove()
        self.regions.suspend()
        for config, implementation in self.experts_before:
            config._experts_implementation = implementation


_ATTRIBUTE = "_modes_fx"


def optimize(
    model: nn.Module,
    plan: SkipPlan | str | os.PathLike[str] | None = None,
    *,
    target: float | None = None,
    decode_target: float | None = None,
    region: Region = "moe",
    dispatch: Dispatch = "auto",
) -> nn.Module:
    """Make a model skip the experts that a plan says do not matter; in place.

    Each routing site is traced and checked now; Inductor compiles on the first call. ``model.generate``, processors and
    evaluation harnesses go on working. Optimising an optimised model starts anew.

    Args:
        model: A Hugging Face model whose experts use transformers' dispatch (64 families do).
        plan: A plan, or the path of one. None keeps every expert.
        target: Target skip ratio, one of ``plan.targets`` or any in ``plan.target_range``, see ``SkipPlan.point``; None takes
            the largest of ``plan.targets``.
        decode_target: The same for decode steps alone; None takes that of ``target``.
        region: What is compiled in place: ``"moe"`` each MoE block, ``"layer"`` each decoder layer, ``"model"`` each stack of
            decoder layers.
        dispatch: ``"compact"`` gathers the kept pairs (data-dependent length), ``"static"`` keeps shapes fixed; ``"auto"`` is
            compact on a CPU and static elsewhere.

    Returns:
        The same model.

    Raises:
        PlanError: The plan is unreadable, for another model, or lacks the target.
        NoRoutingSiteError: The model has no MoE layer, or none could be rewritten.
        CompilerError: Inductor has no C++ compiler.
        ModesFxError: An unknown region or dispatch. The model is left as it was in every case.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"optimize() takes a torch.nn.Module, got {type(model).__name__}.")
    _check_choice("region", region, ("moe", "layer", "model"))
    _check_choice("dispatch", dispatch, ("auto", "compact", "static"))
    layers = find_moe_layers(model)
    if not layers:
        raise NoRoutingSiteError(
            f"{type(model).__name__} has no MoE layer that uses transformers' experts interface "
            "(transformers.integrations.moe): there is nothing to skip."
        )
    plan, bounds = _resolve(model, plan, target, decode_target, len(layers))
    _check_compiler()
    if getattr(model, _ATTRIBUTE, None) is not None:
        restore(model)
    state = _Optimized(model, layers, region, plan.rule if plan else "threshold")
    try:
        state.experts_before = _use_grouped_mm(layers)
        state.layers, state.rejections = probe(layers, state.runtime, dispatch)
        if not state.runtime.sites:
            raise _no_site(state)
        _compile(state, dispatch)
        state.watches = _watch(model, state)  # last, so that it stands in front of a region that is the model itself
        state.runtime.set_bounds(bounds)
    except BaseException:
        state.undo()
        raise
    setattr(model, _ATTRIBUTE, state)
    logger.info("%s: %d of %d routing sites rewritten", state.model_name, len(report(model).rewritten), len(layers))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo ``optimize``: compiled regions, the watch on the modality and the experts implementation.

    Raises:
        NotOptimizedError: The model is not optimised.
    """
    state = optimized_state(model)
    state.undo()
    delattr(model, _ATTRIBUTE)
    return model


def set_plan(
    model: nn.Module,
    plan: SkipPlan | str | os.PathLike[str] | None,
    target: float | None = None,
    *,
    decode_target: float | None = None,
) -> nn.Module:
    """Put other thresholds in force, without any recompilation.

    Args:
        model: An optimised model.
        plan: A plan with the keep-rule that the model was optimised with, or the path of one; None keeps every expert.
        target: Target skip ratio, one of ``plan.targets`` or any in ``plan.target_range``, see ``SkipPlan.point``; None takes
            the largest of ``plan.targets``.
        decode_target: The same for decode steps alone; None takes that of ``target``.

    Returns:
        The same model.

    Raises:
        NotOptimizedError: The model is not optimised.
        PlanError: The plan is unreadable, for another model or another rule, or lacks the target. The old one stays in force.
    """
    state = optimized_state(model)
    plan, bounds = _resolve(model, plan, target, decode_target, len(state.layers))
    if plan is not None and plan.rule != state.rule:
        raise PlanError(
            f"The model was optimised with the keep-rule {state.rule!r}, the plan has {plan.rule!r}. "
            "Call modes_fx.optimize(model, plan) to compile that one."
        )
    state.runtime.set_bounds(bounds)
    return model


def report(model: nn.Module) -> Report:
    """Return what was rewritten in an optimised model and what was not.

    Raises:
        NotOptimizedError: The model is not optimised.
    """
    return _report(optimized_state(model))


def _report(state: _Optimized) -> Report:
    records = [state.runtime.sites.get(i) or state.rejections[i] for i in range(len(state.layers))]
    sites = tuple(_site_report(layer.name, record) for layer, record in zip(state.layers, records, strict=True))
    return Report(state.model_name, state.region, sites, state.runtime.graphs)


def stats(model: nn.Module) -> SkipStats:
    """Return the live skip statistics of an optimised model; see ``SkipStats``.

    Raises:
        NotOptimizedError: The model is not optimised.
    """
    return optimized_state(model).runtime.stats


def optimized_state(model: nn.Module) -> _Optimized:
    """Return the state of an optimised model, for calibration.

    Raises:
        NotOptimizedError: The model is not optimised.
    """
    state = getattr(model, _ATTRIBUTE, None)
    if not isinstance(state, _Optimized):
        raise NotOptimizedError(
            f"This {type(model).__name__} is not optimised. Call modes_fx.optimize(model) first (a copy must be optimised too)."
        )
    return state


def _site_report(name: str, record: SiteRecord) -> SiteReport:
    found = {item.name: getattr(record, item.name) for item in fields(SiteReport) if item.name != "name"}
    return SiteReport(name, **found)


def _no_site(state: _Optimized) -> NoRoutingSiteError:
    found = _report(state)
    first = found.sites[0]
    return NoRoutingSiteError(
        f"No routing site rewritten in {state.model_name}: {found.found} found, {found.found} rejected ({found.reasons()}). "
        f"The first, {first.name}: {first.detail}."
    )


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ModesFxError(f"Unknown {name} {value!r}; known: {', '.join(known)}.")


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError) as error:
        raise no_compiler(error) from error


def _resolve(
    model: Any,
    plan: SkipPlan | str | os.PathLike[str] | None,
    target: float | None,
    decode_target: float | None,
    num_layers: int,
) -> tuple[SkipPlan | None, Tensor | Budget | None]:
    if plan is None:
        for name, value in (("target", target), ("decode_target", decode_target)):
            if value is not None:
                raise PlanError(f"A {name} ({value!r}) needs a plan that knows it.")
        return None, None
    if not isinstance(plan, SkipPlan):
        plan = SkipPlan.load(plan)
    config = getattr(model, "config", None)
    if config is not None:
        plan.check_model(config)
    bounds = plan.bounds(num_layers, target)
    if decode_target is not None:
        bounds = torch.stack([bounds, plan.bounds(num_layers, decode_target)])
    return plan, budget_of(plan, num_layers, bounds, target) if plan.mode == "budget" else bounds


def _use_grouped_mm(layers: Sequence[MoeLayer]) -> list[tuple[Any, Any]]:
    """Make the experts dispatch in the form that can be traced; return their configs and what each named before."""
    configs: dict[int, Any] = {id(layer.experts.config): layer.experts.config for layer in layers}
    before = [(config, config._experts_implementation) for config in configs.values()]
    for config in configs.values():
        config._experts_implementation = _EXPERTS_IMPLEMENTATION
    return before


def _watch(model: nn.Module, state: _Optimized) -> list[ModalityWatch]:
    """Watch the model, and each module on the way down to the regions that can be called with tokens of its own."""
    vision_ids, sees_images = token_ids_for(model)
    compiled = {id(module) for layer in state.layers for module in layer.region(state.region).modules()}
    outer = (module for module in model.modules() if id(module) not in compiled)
    above = [module for module in outer if any(part is state.layers[0].experts for part in module.modules())]
    takes_tokens = [module for module in above if "inputs_embeds" in inspect.signature(module.forward).parameters]
    return [
        ModalityWatch(module, vision_ids, sees_images=sees_images, required=lambda: not state.runtime.keeps_all)
        for module in takes_tokens or [model]
    ]


def _compile(state: _Optimized, dispatch: Dispatch) -> None:
    backend = SkipBackend(state.runtime, state.runtime.rule.keep, dispatch, require_site=True)
    regions: dict[type, list[nn.Module]] = {}
    for index, layer in enumerate(state.layers):
        module = layer.region(state.region)
        if index in state.runtime.sites and not any(module is known for known in regions.get(type(module), ())):
            regions.setdefault(type(module), []).append(module)
    for modules in regions.values():
        state.regions.add(modules, backend, share=state.region == "moe")
