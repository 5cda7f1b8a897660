"""How fast a model runs under a plan against the same weights in stock transformers' fastest setting, measured in turn.

Prefill is the time to the first token of ``generate``, decoding the median time between two tokens after it: both are read off
one clock during the same run, so that neither is the difference of two noisy runs.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import statistics
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from modes_fx.data.batch import Batch, prompts_of
from modes_fx.errors import CalibrationError, ModelError, in_a_line
from modes_fx.graph.code import own_code
from modes_fx.measure.timing import in_turn, now
from modes_fx.models.layers import Region, find_moe_layers
from modes_fx.optimize import is_optimized, stats

logger = logging.getLogger(__name__)

PHASES = ("prefill", "decode")
NEW_TOKENS = 24
ROUNDS = 7  # each setting once in each
WARM_UP = 2  # rounds before them, in which compilers work
RECOMPILE_LIMIT = 64  # torch's own lets a setting run uncompiled without a word, once its layers are more than 8

Times = dict[str, float]
_COMPILED = {
    "moe": "MoE blocks", "layer": "decoder layers", "model": "all layers as one", "graph": "whole over a static cache",
    "generate": "static cache",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """How stock transformers is run.

    Attributes:
        experts: Implementation of its experts; None: as the model was loaded.
        compiled: What of it ``torch.compile`` compiles, each in place; ``"graph"``: its whole call as one graph, for decoding
            over a static cache, as ``generate`` does by itself; ``"generate"``: what that compiles itself over a static cache.
        attention: Implementation of its attention; None: as the model was loaded.
    """

    experts: str | None = None
    compiled: Region | Literal["graph", "generate"] | None = None
    attention: str | None = None

    def __str__(self) -> str:
        what = f", {_COMPILED[self.compiled]} compiled" if self.compiled else ""
        attention = f", {self.attention} attention" if self.attention else ""
        return f"{self.experts or 'as loaded'}{what}{attention}"


# Not batched_mm, which copies weights for each pair: a long prompt's do not fit into memory. Not the loop compiled: it asks the
# device which experts have tokens, so that dynamo makes graphs by expert and by length.
SETTINGS = (
    Setting("eager"), Setting("grouped_mm"), Setting("grouped_mm", "moe"), Setting("grouped_mm", "layer"),
    Setting("grouped_mm", "model"),
)  # fmt: skip
STATIC = Setting("grouped_mm", "generate")


@dataclass(frozen=True)
class Speed:
    """One plan against stock.

    Attributes:
        times: How many times as fast as the fastest stock setting, by phase: median over rounds. NaN where it cannot be told.
        ranges: The smallest and the largest of the rounds.
        skipped: Skip ratios of both phases; NaN where nothing was routed.
    """

    times: Times
    ranges: dict[str, tuple[float, float]]
    skipped: Times


class Stopwatch:
    """Times prefill and decoding of one batch of prompts.

    All stock settings are timed in turn, and the fastest of each phase is the bar from then on: it runs in turn with what is
    compared to it, which decodes over a static cache where the bar does.

    Args:
        model: The model before it is optimised; stock twins that share its weights are made of it.
        batch: One batch of test data; its answers are cut off.
        chosen: The bar's settings by phase, if they are known: then no others are timed.
        on_step: Called with (settings timed, settings to time in all).

    Attributes:
        chosen: The bar's setting in each phase, as text.
        facts: ``stock_ms``: each setting's medians by phase, ms and ms a token; ``failed``: why those not there do not run;
            the prompts' ``batch`` and ``prompt_tokens``; and ``threads``.

    Raises:
        CalibrationError: No stock setting runs.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        chosen: Mapping[str, str] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> None:
        self._prompts = prompts_of(batch, next(model.parameters()).device)
        size, length = self._prompts["input_ids"].shape
        self.facts: dict[str, Any] = {"batch": size, "prompt_tokens": length, "threads": torch.get_num_threads()}
        wanted = [setting for setting in settings_of(model) if chosen is None or str(setting) in chosen.values()]
        self._static = {str(setting) for setting in wanted if setting.compiled == "generate"}
        twins, failed = self._twins(model, wanted)
        if chosen is None:
            logger.info("timing %d stock settings", len(twins))
            times = _in_turn({name: self._runner(twin, name in self._static) for name, twin in twins.items()}, on_step)
            medians = {name: {phase: _median(column) for phase, column in found.items()} for name, found in times.items()}
            self.facts["stock_ms"] = {
                name: {phase: 1e3 * seconds for phase, seconds in found.items()} for name, found in medians.items()
            }
            self.facts["failed"] = failed
            chosen = {phase: min(medians, key=lambda name: _or_last(medians[name][phase])) for phase in PHASES}
        self.chosen = dict(chosen)
        if missing := set(self.chosen.values()) - twins.keys():
            reasons = "; ".join(f"{name}: {failed.get(name, 'no setting of this model')}" for name in sorted(missing))
            raise CalibrationError(f"A setting of stock that times were compared with does not run any more: {reasons}.")
        self._stock = {name: self._runner(twins[name], name in self._static) for name in dict.fromkeys(self.chosen.values())}

    def __call__(self, model: nn.Module) -> Speed:
        """Time an optimised model under the plan in force, in turn with the bar."""
        caches = {phase: "static" if name in self._static else "dynamic" for phase, name in self.chosen.items()}
        mine = {cache: self._runner(model, cache == "static") for cache in dict.fromkeys(caches.values())}
        found = _in_turn({**self._stock, **mine})
        times, ranges = {}, {}
        for phase in PHASES:
            rounds = zip(found[self.chosen[phase]][phase], found[caches[phase]][phase], strict=True)
            ratios = [bar / mine for bar, mine in rounds if mine > 0 and bar > 0]
            times[phase] = _median(ratios)
            ranges[phase] = (min(ratios, default=math.nan), max(ratios, default=math.nan))
        counted = stats(model)
        with counted.reset().counting():
            self._run(model)
        return Speed(times, ranges, {phase: counted.skip_ratio(phase=phase) for phase in PHASES})

    def _twins(self, model: nn.Module, wanted: Sequence[Setting]) -> tuple[dict[str, nn.Module], dict[str, str]]:
        """Return the settings that run, warm, and why others do not."""
        twins, failed = {}, {}
        for setting in wanted:
            try:
                twin = stock_twin(model, setting)
                for _ in range(WARM_UP):
                    self._run(twin, static=str(setting) in self._static, stock=True)
                twins[str(setting)] = twin
            except Exception as error:  # whatever a model's code or a compiler raises: the setting is none that users have
                failed[str(setting)] = in_a_line(error)
        if not twins:
            raise CalibrationError(
                f"No stock setting of {type(model).__name__} generates text, to compare speeds with: {failed}."
            )
        return twins, failed

    def _runner(self, model: nn.Module, static: bool) -> Callable[[], Times]:
        return lambda: self._run(model, static=static, stock=not is_optimized(model))

    def _run(self, model: Any, *, static: bool = False, stock: bool = False) -> Times:
        """Generate once; return the seconds of each phase, NaN where no token was timed."""
        limit: Any = {"recompile_limit": RECOMPILE_LIMIT} if stock else {}
        cache = {"cache_implementation": "static"} if static else {}
        clock, tokens = _Clock(), 1 + NEW_TOKENS
        with torch._dynamo.config.patch(limit):
            started = now(self._prompts["input_ids"].device)
            model.generate(
                **self._prompts, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False,
                stopping_criteria=StoppingCriteriaList([clock]), **cache,
            )  # fmt: skip
        steps = [later - earlier for earlier, later in itertools.pairwise(clock.seen)]
        return {"prefill": clock.seen[0] - started if clock.seen else math.nan, "decode": _median(steps)}


def settings_of(model: nn.Module) -> Sequence[Setting]:
    """Return the settings to try: those of the experts only where the model's go through transformers' interface."""
    settings = (*SETTINGS, STATIC) if compiles_itself(model) else SETTINGS
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


class _Clock(StoppingCriteria):
    """Notes when each token was chosen; stops nothing."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.seen.append(now(input_ids.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _in_turn(
    runners: Mapping[str, Callable[[], Times]], on_step: Callable[[int, int], None] | None = None
) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of the timed rounds; see ``modes_fx.measure.timing.in_turn``."""
    found = in_turn(runners, ROUNDS, WARM_UP, on_step=on_step)
    return {name: {phase: [seconds[phase] for seconds in column] for phase in PHASES} for name, column in found.items()}


def _median(values: Sequence[float]) -> float:
    told = [value for value in values if not math.isnan(value)]
    return statistics.median(told) if told else math.nan


def _or_last(seconds: float) -> float:
    return math.inf if math.isnan(seconds) else seconds
