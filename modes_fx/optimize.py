"""optimize() and what goes with it: what a user calls, with its checks."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from modes_fx.attach.optimized import Optimized, compile_regions, report_of, trace_sites
from modes_fx.attach.protection import watch_attention
from modes_fx.attach.watch import GroupWatch, watch_modality
from modes_fx.errors import ModelError, ModesFxError, NoRoutingSiteError, NotOptimizedError, PlanError, no_compiler
from modes_fx.graph.backend import inductor_settings
from modes_fx.models.layers import MoeLayer, Region, find_moe_layers, has_accelerate_hooks, no_moe_layer
from modes_fx.models.sharding import check_sharding, expert_parallel, sends
from modes_fx.passes.reasons import REASONS
from modes_fx.passes.skip_experts import Dispatch
from modes_fx.plan import SkipPlan
from modes_fx.plan.budget import Budget, budget_of
from modes_fx.report import Report, SkipStats

logger = logging.getLogger(__name__)
_ATTRIBUTE = "_modes_fx"


def optimize(
    model: nn.Module,
    plan: SkipPlan | str | os.PathLike[str] | None = None,
    *,
    target: float | None = None,
    decode_target: float | None = None,
    region: Region = "moe",
    dispatch: Dispatch = "auto",
    mode: str | None = None,
    dynamic: bool | None = None,
    options: Mapping[str, Any] | None = None,
    prepack: bool = False,
) -> nn.Module:
    """Make a model skip the experts that a plan says do not matter; in place.

    Each routing site is traced and checked now; Inductor compiles on the first call. ``model.generate``, processors and
    evaluation harnesses go on working. Optimising an optimised model starts anew.

    Args:
        model: A Hugging Face model whose experts use transformers' dispatch, or whose MoE blocks can be converted to it
            (``modes_fx.models.convert``): these are for inference alone. Or ``torch.compile`` of one.
        plan: A plan, or the path of one. None keeps every expert.
        target: Target skip ratio, one of ``plan.targets`` or any in ``plan.target_range``, see ``SkipPlan.point``; None takes
            the largest of ``plan.targets``.
        decode_target: The same for decode steps alone, all of whose tokens are text, so that one target may skip more or less
            of them than of a prefill; None takes that of ``target``.
        region: What is compiled in place, for a model that is called from Python: ``"moe"`` each MoE block, which everything
            around goes on working with; ``"layer"`` each decoder layer, ``"model"`` each stack of them, where attention is
            worth compiling too: prefill and decoding over a cache that grows are faster (docs/speed.md), while hooks inside
            and offloading are refused. What somebody else compiles around the model is one graph with any of them.
        dispatch: ``"auto"``, for every model: what is fastest on its device. The two that it chooses between are there to look
            at one device's graphs on another, and to test them: ``"compact"`` (a CPU) gathers the kept pairs, with lengths
            that depend on data; ``"static"`` (elsewhere) keeps shapes fixed, as CUDA graphs ask for.
        mode: Inductor's, as for ``torch.compile``, such as ``"reduce-overhead"``: for regions, which nobody else compiles.
        dynamic: As for ``torch.compile``, for regions: whether sizes may vary from the first graph on. None: from their first
            change on.
        options: Inductor's settings, as for ``torch.compile``, for regions; they go before the mode's.
        prepack: Whether to turn weights of experts that are stored transposed along the dimension in which kernels on a CPU
            read, and to pack other bfloat16 ones for oneDNN's matrix kernels (little gain with AMX; docs/speed.md says where
            there is one); one by one, in the place of the originals.
            ``state_dict`` and ``save_pretrained`` give the weights as they were, and ``restore`` puts them back; until then
            other models cannot share packed ones, and they cannot be changed.

    Returns:
        The same model.

    Raises:
        PlanError: The plan is unreadable, for another model, or lacks the target.
        NoRoutingSiteError: The model has no MoE layer, or none could be rewritten.
        CompilerError: Inductor has no C++ compiler, or torch.compile is switched off.
        ModelError: The region is not ``"moe"``, and accelerate's hooks or an all-to-all are inside it; the model is a stage of
            a pipeline, or in a ``FullyShardedDataParallel``; or ``prepack`` has nothing to pack.
        ModesFxError: An unknown region, dispatch, mode or option.

    In every case the model is left as it was, but for one that was optimised before: that may be left restored.
    """
    given, model = model, _own(model)
    if not isinstance(model, nn.Module):
        raise ModelError(f"optimize() takes a torch.nn.Module, got {type(model).__name__}.")
    _check_choice("region", region, ("moe", "layer", "model"))
    _check_choice("dispatch", dispatch, ("auto", "compact", "static"))
    settings = inductor_settings(mode, options or {})
    check_sharding(model)
    layers = find_moe_layers(model)
    if not layers:
        raise NoRoutingSiteError(no_moe_layer(model))
    _check_hooks(layers, region)
    plan, bounds = _resolve(model, plan, target, decode_target, len(layers))
    _check_compiler()
    if is_optimized(model):
        restore(model)
    state = trace_sites(model, layers, region, dispatch, plan.rule if plan else "threshold")
    try:
        if not state.runtime.sites:
            raise _no_site(state)
        if prepack:
            state.packing.pack([layer.experts for _, layer in state.rewritten if layer.stands_for is None])
        compile_regions(state, dynamic, settings)
        state.watches = watch_modality(model, state.layers, state.runtime, state.check)
        if state.runtime.rule.protects:
            watches, state.attention_before = watch_attention(state.layers, state.runtime)
            state.watches += watches
        _put_in_force(state, plan, bounds)
        state.runtime.follow(next(model.parameters()).device)  # where inputs will come from, before anybody compiles
    except BaseException:
        state.undo()
        raise
    vars(model)[_ATTRIBUTE] = state
    _forget_compiled_call(model)
    logger.info("%s: %d of %d routing sites rewritten", state.model_name, len(report(model).rewritten), len(layers))
    return given


def restore(model: nn.Module) -> nn.Module:
    """Undo ``optimize``: compiled regions, converted blocks, the watch on the modality and the experts implementation.

    Raises:
        NotOptimizedError: The model is not optimised.
    """
    state = optimized_state(model)
    state.undo()
    del vars(_own(model))[_ATTRIBUTE]
    _forget_compiled_call(_own(model))
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
    _put_in_force(state, plan, bounds)
    return model


def _put_in_force(state: Optimized, plan: SkipPlan | None, bounds: Tensor | Budget | None) -> None:
    if isinstance(bounds, Budget) and any(isinstance(watch, GroupWatch) for watch in state.watches):
        raise PlanError(
            f"{state.model_name} has experts of its own for each modality, so that no layer sees all tokens of a forward, by "
            'which a budget is kept. Use fixed thresholds: dataclasses.replace(plan, mode="fixed").'
        )
    tables = plan.table_tensors(len(state.layers)) if plan is not None and plan.tables is not None else None
    state.runtime.set_bounds(bounds, tables)


def report(model: nn.Module) -> Report:
    """Return what was rewritten in an optimised model and what was not.

    Raises:
        NotOptimizedError: The model is not optimised.
    """
    return report_of(optimized_state(model))


def stats(model: nn.Module) -> SkipStats:
    """Return the live skip statistics of an optimised model; see ``SkipStats``.

    Raises:
        NotOptimizedError: The model is not optimised.
    """
    return optimized_state(model).runtime.stats


def optimized_state(model: nn.Module) -> Optimized:
    """Return the state of an optimised model, for calibration.

    Raises:
        NotOptimizedError: The model is not optimised.
    """
    model = _own(model)
    state = getattr(model, _ATTRIBUTE, None)
    if not isinstance(state, Optimized):
        raise NotOptimizedError(
            f"This {type(model).__name__} is not optimised. Call modes_fx.optimize(model) first (a copy must be optimised too)."
        )
    return state


def is_optimized(model: nn.Module) -> bool:
    """Return whether ``optimize`` was called on the model and not undone."""
    return isinstance(getattr(_own(model), _ATTRIBUTE, None), Optimized)


def _forget_compiled_call(model: nn.Module) -> None:
    """Let ``generate`` compile the model's call anew: what it keeps is the call that the model had."""
    for name in ("_compiled_call", "_last_compile_config"):
        vars(model).pop(name, None)


def _own(model: Any) -> Any:
    """Return the model itself, where ``torch.compile(model)`` of it was given."""
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def _no_site(state: Optimized) -> NoRoutingSiteError:
    found = report_of(state)
    first = found.sites[0]
    return NoRoutingSiteError(
        f"No routing site rewritten in {state.model_name}: {found.found} found, {found.found} rejected ({found.reasons()}). "
        f"The first, {first.name}: {first.detail}. {REASONS[first.code].advice}"
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


def _check_hooks(layers: Sequence[MoeLayer], region: Region) -> None:
    """Refuse to compile over what moves weights or tokens."""
    for module in {id(layer.region(region)): layer.region(region) for layer in layers if region != "moe"}.values():
        if has_accelerate_hooks(module):
            raise ModelError(
                f"accelerate's hooks move weights inside {type(module).__name__}, which cannot be traced as one graph. "
                'Use region="moe".'
            )
    implementations = [expert_parallel(layer.experts) for layer in layers if region != "moe"]
    if any(found is not None and sends(found) for found in implementations):
        raise ModelError(
            "Tokens travel to their experts by all-to-all, which reads their number in every layer and cannot be traced as one "
            'graph. Use region="moe".'
        )
