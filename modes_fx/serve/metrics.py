"""Skip ratios in vLLM's log, beside its own periodic line, and among its Prometheus metrics.

Workers count on the device; the process that logs asks them when it does. So a step costs nothing more, and metrics are as old
as the last line at most (``VLLM_LOG_STATS_INTERVAL``). Pairs are handed out once: several API servers sum up to the whole.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

from modes_fx.modality import MODALITIES
from modes_fx.report import PHASES
from modes_fx.serve.plugin import asked

logger = logging.getLogger("vllm.modes_fx")
TAKE = "modes_fx_take_pairs"


def report_with_log() -> None:
    """Make engines with settings report whenever they log; again does nothing more."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    if hasattr(AsyncLLM.do_log_stats, "__wrapped__"):
        return
    log_async, log = AsyncLLM.do_log_stats, LLMEngine.do_log_stats

    @functools.wraps(log_async)
    async def do_log_stats_async(self: Any) -> None:
        if self.logger_manager and asked(self.vllm_config):
            report(await self.collective_rpc(TAKE))
        await log_async(self)

    @functools.wraps(log)
    def do_log_stats(self: Any) -> None:
        if self.logger_manager and asked(self.vllm_config):
            report(self.collective_rpc(TAKE))
        log(self)

    AsyncLLM.do_log_stats, LLMEngine.do_log_stats = do_log_stats_async, do_log_stats


def report(workers: Sequence[Sequence[int] | None]) -> None:
    """Log and count the pairs that workers have seen since the last time, each as ``Thresholds.pairs``, or None."""
    grown = [sum(numbers) for numbers in zip(*(each for each in workers if each is not None), strict=True)]
    named: dict[tuple[str, str], tuple[int, int]] = {
        (modality, phase): (grown[4 * m + 2 * p], grown[4 * m + 2 * p + 1])
        for m, modality in enumerate(MODALITIES)
        for p, phase in enumerate(PHASES)
    }
    counter = _counter()
    for (modality, phase), (routed, kept) in named.items():
        counter.labels(modality, phase, "true").inc(kept)
        counter.labels(modality, phase, "false").inc(routed - kept)
    seen = {name: numbers for name, numbers in named.items() if numbers[0]}
    if seen:
        logger.info("modes-fx: %s", summary(seen))


def summary(seen: dict[tuple[str, str], tuple[int, int]]) -> str:
    """Return a line such as ``75.0% of pairs skipped (text prefill 23.1%, vision prefill 92.4%)``."""
    routed, kept = (sum(column) for column in zip(*seen.values(), strict=True))
    parts = [f"{modality} {phase} {1 - kept / routed:.1%}" for (modality, phase), (routed, kept) in seen.items()]
    return f"{1 - kept / routed:.1%} of pairs skipped ({', '.join(parts)})"


@functools.cache
def _counter() -> Any:
    from prometheus_client import Counter

    return Counter("modes_fx_pairs", "Pairs of token and expert, kept or skipped.", ["modality", "phase", "kept"])
