"""What every measurement of time shares: settings run in turn, one after the other in each round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

T = TypeVar("T")

_FEWEST = 3  # rounds that a limit of time leaves


def in_turn(
    runners: Mapping[str, Callable[[], T]],
    rounds: int,
    warm_up: int,
    *,
    on_round: Callable[[int], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    limit_s: float | None = None,
) -> dict[str, list[T]]:
    """Run all once a round, so that a busy moment of the machine hits all alike.

    Args:
        runners: What to run, by name; each returns what it measured.
        rounds: Rounds whose results are returned.
        warm_up: Rounds before them, in which compilers work.
        on_round: Called before each round with its number; those that warm up are negative.
        on_step: Called with (runs done, runs in all).
        limit_s: Seconds after which no round begins, once three have ended.

    Returns:
        What each measured, a value a round.
    """
    found: dict[str, list[T]] = {name: [] for name in runners}
    done, total = 0, (warm_up + rounds) * len(runners)
    started = time.perf_counter()
    for index in range(-warm_up, rounds):
        if limit_s is not None and index >= _FEWEST and time.perf_counter() - started > limit_s:
            break
        if on_round is not None:
            on_round(index)
        for name, run in runners.items():
            measured = run()
            if index >= 0:
                found[name].append(measured)
            done += 1
            if on_step is not None:
                on_step(done, total)
    return found


def now(device: torch.device) -> float:
    """Return the seconds of a clock once a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
