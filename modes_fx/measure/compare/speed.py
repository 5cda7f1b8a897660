"""How fast a model runs under a plan against the same weights in stock transformers, each in its fastest setting.

Prefill is the time to the first token of ``generate``, decoding the median time between two tokens after it: both are read off
one clock during the same run, so that neither is the difference of two noisy runs.
"""

from __future__ import annotations

import itertools
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

from modes_fx.data.batch import Batch, prompts_of
from modes_fx.errors import CalibrationError, in_a_line
from modes_fx.measure.timing import in_turn, now
from modes_fx.measure.twins import OURS, RECOMPILE_LIMIT, Setting, our_settings, stock_settings, stock_twin
from modes_fx.models.layers import Region
from modes_fx.optimize import is_optimized, optimize, restore, stats
from modes_fx.plan import SkipPlan

logger = logging.getLogger(__name__)

PHASES = ("prefill", "decode")
NEW_TOKENS = 24
ROUNDS = 7  # each setting once in each
WARM_UP = 2  # rounds before them, in which compilers work

Times = dict[str, float]
Twins = dict[str, tuple[nn.Module, Setting]]


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

    All stock settings are timed in turn, and the fastest of each phase is the bar from then on, which runs in turn with what is
    compared to it: first modes-fx in each of its settings, with nothing skipped. Plans are timed in the fastest of those.

    Args:
        model: The model, not optimised; stock twins that share its weights are made of it.
        batch: One batch of test data; its answers are cut off.
        known: The facts of an earlier one: then no settings but the bar's are made.
        on_step: Called with (settings timed, settings to time in all).

    Attributes:
        facts: ``fastest`` and ``ours``: the fastest settings of stock and of modes-fx by phase; ``stock_ms``: medians of each
            of stock's by phase, ms and ms a token; ``ours_times``: how many times as fast as the bar each of ours is;
            ``failed``: why those not there do not run; the prompts' ``batch`` and ``prompt_tokens``; and ``threads``.

    Raises:
        CalibrationError: No setting of stock runs, or none of modes-fx.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        known: Mapping[str, Any] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> None:
        self._prompts = prompts_of(batch, next(model.parameters()).device)
        self._ours = {str(setting): setting for setting in our_settings(model)}
        wanted = [setting for setting in stock_settings(model) if known is None or str(setting) in known["fastest"].values()]
        twins, failed = self._twins(model, wanted)
        self.facts = dict(known) if known else {**self._timed(twins, on_step), "failed": failed}
        if missing := set(self.facts["fastest"].values()) - twins.keys():
            reasons = "; ".join(f"{name}: {failed.get(name, 'no setting of this model')}" for name in sorted(missing))
            raise CalibrationError(f"A setting of stock that times were compared with does not run any more: {reasons}.")
        self._stock = {name: partial(self._run, *twins[name]) for name in dict.fromkeys(self.facts["fastest"].values())}
        if not known:
            self._choose_ours(model)

    def __call__(self, model: nn.Module, setting: str) -> Speed:
        """Time a model that was optimised for a setting of modes-fx, under the plan in force, in turn with the bar."""
        run = partial(self._run, model, self._ours[setting])
        found = _in_turn({**self._stock, setting: run})
        times, ranges = {}, {}
        for phase in PHASES:
            rounds = zip(found[self.facts["fastest"][phase]][phase], found[setting][phase], strict=True)
            ratios = [bar / mine for bar, mine in rounds if mine > 0 and bar > 0]
            times[phase] = _median(ratios)
            ranges[phase] = (min(ratios, default=math.nan), max(ratios, default=math.nan))
        counted = stats(model)
        with counted.reset().counting():
            run()
        return Speed(times, ranges, {phase: counted.skip_ratio(phase=phase) for phase in PHASES})

    def optimize(self, model: nn.Module, setting: str, plan: SkipPlan | None) -> None:
        """Optimise a model for a setting of modes-fx."""
        compiled = self._ours[setting].compiled
        # The graph that generate makes over a static cache is around any region.
        optimize(model, plan, region=cast("Region", compiled if compiled in get_args(Region) else "moe"))

    def _choose_ours(self, model: nn.Module) -> None:
        """Time modes-fx in each setting, one after the other: converted models that share weights cannot be at once."""
        found: dict[str, Times] = {}
        for name in self._ours:
            logger.info("timing %s, all kept", name)
            try:
                self.optimize(model, name, None)
                found[name] = self(model, name).times
            except Exception as error:  # as of stock
                self.facts["failed"][name] = _told(name, error)
            finally:
                if is_optimized(model):
                    restore(model)
        if not found:
            raise CalibrationError(
                f"modes-fx runs in no setting on {type(model).__name__}, to compare speeds with: {self.facts['failed']}."
            )
        ours = {phase: max(found, key=lambda name: _number(found[name][phase], 0.0)) for phase in PHASES}
        self.facts |= {"ours": ours, "ours_times": found}

    def _timed(self, twins: Twins, on_step: Callable[[int, int], None] | None) -> dict[str, Any]:
        """Time stock's settings; return the facts of that."""
        logger.info("timing %d stock settings", len(twins))
        times = _in_turn({name: partial(self._run, *twin) for name, twin in twins.items()}, on_step)
        medians = {name: {phase: _median(column) for phase, column in found.items()} for name, found in times.items()}
        size, length = self._prompts["input_ids"].shape
        return {
            "fastest": {phase: min(medians, key=lambda name: _number(medians[name][phase], math.inf)) for phase in PHASES},
            "stock_ms": {name: {phase: 1e3 * each for phase, each in found.items()} for name, found in medians.items()},
            "batch": size, "prompt_tokens": length, "threads": torch.get_num_threads(),
        }  # fmt: skip

    def _twins(self, model: nn.Module, wanted: Sequence[Setting]) -> tuple[Twins, dict[str, str]]:
        """Return twins in the settings of stock that run, warm, and why others do not."""
        twins, failed = {}, {}
        for setting in wanted:
            try:
                twin = stock_twin(model, setting)
                for _ in range(WARM_UP):
                    self._run(twin, setting)
                twins[str(setting)] = twin, setting
            except Exception as error:  # whatever a model's code or a compiler raises: the setting is none that users have
                failed[str(setting)] = _told(str(setting), error)
        if not twins:
            raise CalibrationError(
                f"No stock setting of {type(model).__name__} generates text, to compare speeds with: {failed}."
            )
        return twins, failed

    def _run(self, model: Any, setting: Setting) -> Times:
        """Generate once; return the seconds of each phase, NaN where no token was timed."""
        limit: Any = {} if setting.experts == OURS else {"recompile_limit": RECOMPILE_LIMIT}
        cache = {"cache_implementation": "static"} if setting.compiled == "generate" else {}
        clock, tokens = _Clock(), 1 + NEW_TOKENS
        with torch._dynamo.config.patch(limit):
            started = now(self._prompts["input_ids"].device)
            model.generate(
                **self._prompts, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False,
                stopping_criteria=StoppingCriteriaList([clock]), **cache,
            )  # fmt: skip
        steps = [later - earlier for earlier, later in itertools.pairwise(clock.seen)]
        return {"prefill": clock.seen[0] - started if clock.seen else math.nan, "decode": _median(steps)}


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


def _told(setting: str, error: Exception) -> str:
    """Return why a setting does not run, once the user has been told."""
    reason = in_a_line(error)
    logger.warning("%s does not run, and is not timed: %s", setting, reason)
    return reason


def _median(values: Sequence[float]) -> float:
    told = [value for value in values if not math.isnan(value)]
    return statistics.median(told) if told else math.nan


def _number(value: float, otherwise: float) -> float:
    return otherwise if math.isnan(value) else value
