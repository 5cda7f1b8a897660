"""Prefill and decode times of stock settings and of modes-fx, measured in turn in one run."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modes_fx.measure.timing import in_turn, now
from modes_fx.measure.twins import Setting, stock_twin
from modes_fx.models.device import cpu_name, device_name
from modes_fx.optimize import optimize, set_plan
from modes_fx.plan import SkipPlan

logger = logging.getLogger(__name__)

_NEW_TOKENS = 24


def time_settings(
    load: Callable[[], Any],
    inputs: Mapping[str, Tensor],
    plan: SkipPlan,
    *,
    rounds: int = 9,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Time every setting once a round, so that a busy moment of the machine hits all of them alike.

    Stock runs in four settings: transformers' ``grouped_mm`` dispatch, its loop over experts, its MoE blocks compiled by
    Inductor (the same region that modes-fx compiles), and all its decoder layers as one.

    Args:
        load: Returns a fresh model, where the prompts are.
        inputs: A batch of prompts.
        plan: modes-fx runs with all pairs kept, and at each target of the plan.
        rounds: Timed rounds; two more go before them to compile and warm up.
        on_step: Called with (settings timed, settings to time in all).

    Returns:
        ``prefill_ms`` and ``decode_ms_per_token``, each setting's median, and ``setup``.
    """
    logger.info("timing %d stock settings and %d of modes-fx, compiled first", 4, 1 + len(plan.targets))
    stock, ours = load(), optimize(load())
    twins = {
        "stock": stock,
        "stock, expert loop": stock_twin(stock, Setting("eager")),
        "stock, MoE blocks compiled": stock_twin(stock, Setting("grouped_mm", "moe")),
        "stock, all layers compiled": stock_twin(stock, Setting("grouped_mm", "model")),
    }

    def with_target(target: float | None) -> nn.Module:
        return set_plan(ours, None if target is None else plan, target)

    settings: dict[str, Callable[[], nn.Module]] = {
        **{name: lambda twin=twin: twin for name, twin in twins.items()},  # type: ignore[misc]
        "modes-fx, all kept": lambda: with_target(None),
        **{f"modes-fx at {target:g}": lambda target=target: with_target(target) for target in plan.targets},  # type: ignore[misc]
    }

    def timer(prepare: Callable[[], nn.Module]) -> Callable[[], tuple[float, float]]:
        def run() -> tuple[float, float]:
            model = prepare()
            first = _seconds(model, inputs, 1)
            more = _seconds(model, inputs, 1 + _NEW_TOKENS)
            return first * 1e3, (more - first) / _NEW_TOKENS * 1e3

        return run

    found = in_turn({name: timer(prepare) for name, prepare in settings.items()}, rounds, 2, on_step=on_step)
    device = inputs["input_ids"].device
    return {
        "prefill_ms": _medians(found, 0),
        "decode_ms_per_token": _medians(found, 1),
        "setup": {
            "threads": torch.get_num_threads(),
            "batch": inputs["input_ids"].shape[0],
            "prompt_tokens": inputs["input_ids"].shape[1],
            "dtype": str(next(stock.parameters()).dtype).removeprefix("torch."),
            "cpu": cpu_name(),
            **({"gpu": device_name(device)} if device.type == "cuda" else {}),
            "rounds": rounds,
        },
    }


def _seconds(model: Any, inputs: Mapping[str, Tensor], new_tokens: int) -> float:
    device = inputs["input_ids"].device
    started = now(device)
    model.generate(**inputs, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False)
    return now(device) - started


def _medians(times: Mapping[str, Sequence[tuple[float, float]]], phase: int) -> dict[str, float]:
    return {name: round(statistics.median(pair[phase] for pair in values), 3) for name, values in times.items()}
