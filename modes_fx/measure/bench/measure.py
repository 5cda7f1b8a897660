"""Time what does the same work, in turn, on inputs new each round: medians, ratios and distances to the limit."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modes_fx.errors import ModesFxError, in_a_line
from modes_fx.measure.bench.machine import Limit
from modes_fx.measure.bench.settings import DEFAULT, Contender
from modes_fx.measure.timing import in_turn, now
from modes_fx.measure.twins import RECOMPILE_LIMIT
from modes_fx.modality import Phase, token_modality
from modes_fx.optimize import stats

_WARM_UP = 2
_MOST_COUNTED = 16  # tokens x rounds say enough about a skip ratio by then
_DECODING = 8  # so few tokens at once are a decode step of a batch

Arguments = Callable[[int], dict[str, Any]]


@dataclass(frozen=True)
class Work:
    """What all contenders do.

    Attributes:
        part: Of the benchmark, such as ``block``.
        phase: Prefill or decode.
        tokens: T.
        classes: int64 [1, T], 0 text and 1 visual; where they are, the work runs.
        arguments: Given a round, returns fresh arguments of the forward; equal ones for equal rounds.
        limit: Given a round and the thresholds of (text, visual) tokens, returns the least time.
        static: The same as ``arguments``, with a static cache, for contenders that take one.
    """

    part: str
    phase: Phase
    tokens: int
    classes: Tensor
    arguments: Arguments
    limit: Callable[[int, tuple[float, float] | None], Limit]
    static: Arguments | None = None

    def arguments_of(self, contender: Contender, index: int) -> dict[str, Any]:
        """Return fresh arguments of a round for a contender."""
        return (self.static if contender.static and self.static else self.arguments)(index)


@dataclass(frozen=True)
class Row:
    """One contender's times.

    Attributes:
        part: Of the benchmark.
        phase: Prefill or decode.
        threads: Threads that ran.
        tokens: T.
        setting: The contender's name.
        kind: ``stock``, ``peer`` or ``ours``.
        skip: Skip ratio that was asked for.
        skipped: Skip ratio counted.
        rounds_ms: Times.
        ms: Their median.
        to_stock: Time / time of stock's default, ``grouped_mm``: median over rounds.
        to_best: The same with the fastest stock setting, that of the least median.
        limit_ms: Least time on this machine, median over rounds; see ``machine.Limit``.
        to_limit: Time / least time: median over rounds.
    """

    part: str
    phase: Phase
    threads: int
    tokens: int
    setting: str
    kind: str
    skip: float
    skipped: float
    rounds_ms: tuple[float, ...]
    ms: float
    to_stock: float
    to_best: float
    limit_ms: float
    to_limit: float


def time_work(
    work: Work,
    contenders: Sequence[Contender],
    rounds: int,
    *,
    limit_s: float,
    failed: dict[str, str],
    flush: Callable[[], Any],
    on_step: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Time contenders in turn.

    Args:
        work: What they do; each round brings new inputs, the same for all.
        contenders: Without stock's default there are no ratios to stock (they are NaN).
        rounds: Timed rounds.
        limit_s: Seconds after which no round begins, once three have ended.
        failed: Takes up why a setting of others does not run; it is left out.
        flush: Called before each run, to drive weights out of caches that another contender has just read.
        on_step: Called with (runs done, runs in all).

    Raises:
        ModesFxError: Stock's default, or modes-fx, does not run.
    """
    names = [f"{each.name} {each.skip}" for each in contenders]
    running = {name: each for name, each in zip(names, contenders, strict=True) if _warm_up(work, each, failed)}
    now = -1

    def on_round(index: int) -> None:
        nonlocal now
        now = index

    runners = {name: (lambda each=each: _milliseconds(work, each, now, flush)) for name, each in running.items()}
    found = in_turn(runners, rounds, 0, on_round=on_round, on_step=on_step, limit_s=limit_s)
    default = next((times for name, times in found.items() if running[name].name == f"stock {DEFAULT}"), [])
    stock = [times for name, times in found.items() if running[name].kind == "stock"]
    best = min(stock, key=statistics.median, default=[])
    rows = []
    for name, times in found.items():
        each = running[name]
        limits = [work.limit(index, each.taus).ms for index in range(len(times))]
        rows.append(
            Row(
                work.part, work.phase, torch.get_num_threads(), work.tokens, each.name, each.kind, each.skip,
                _skipped(work, each, len(times)), tuple(times), statistics.median(times), median_ratio(times, default),
                median_ratio(times, best), statistics.median(limits), median_ratio(times, limits),
            )
        )  # fmt: skip
    return rows


def median_ratio(times: Sequence[float], to: Sequence[float]) -> float:
    """Return the median, over rounds, of time / time; NaN where there is nothing to compare with."""
    return statistics.median(mine / other for mine, other in zip(times, to, strict=True)) if to else float("nan")


def phase_of(tokens: int) -> Phase:
    """Return what so many tokens in a block stand for."""
    return "decode" if tokens <= _DECODING else "prefill"


def run_once(work: Work, contender: Contender, arguments: Mapping[str, Any]) -> float:
    """Run a contender once; return the seconds it took."""
    limit: Any = {"recompile_limit": RECOMPILE_LIMIT} if contender.kind != "ours" else {}
    with token_modality(work.classes), torch._dynamo.config.patch(limit):
        started = now(work.classes.device)
        contender.model(**arguments)
        return now(work.classes.device) - started


def _milliseconds(work: Work, contender: Contender, index: int, flush: Callable[[], Any]) -> float:
    contender.prepare()
    arguments = work.arguments_of(contender, index)
    flush()
    return 1e3 * run_once(work, contender, arguments)


def _warm_up(work: Work, contender: Contender, failed: dict[str, str]) -> bool:
    """Let compilers work; return whether the contender runs."""
    try:
        contender.prepare()
        for index in range(1, 1 + _WARM_UP):
            run_once(work, contender, work.arguments_of(contender, -index))
    except ModesFxError:
        raise
    except Exception as error:  # whatever stock code or a compiler raises: the setting is none that users have
        if contender.kind == "ours" or contender.name == f"stock {DEFAULT}":
            raise
        failed[f"{contender.name} ({work.part}, {work.phase} of T {work.tokens})"] = in_a_line(error)
        return False
    return True


def _skipped(work: Work, contender: Contender, rounds: int) -> float:
    """Count, on the inputs that were timed, what was skipped."""
    if contender.taus is None:
        return 0.0
    contender.prepare()
    with stats(contender.model).reset().counting() as counted:
        for index in range(rounds if work.tokens <= _MOST_COUNTED else 1):
            run_once(work, contender, work.arguments_of(contender, index))
    return counted.skip_ratio()
