"""The parts of the benchmark: one MoE block, decoder layers, growth with the number of tokens, what skipping itself costs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from modes_fx.measure.bench import overhead
from modes_fx.measure.bench.machine import Limit, Limits, Machine
from modes_fx.measure.bench.machine import measure as measure_machine
from modes_fx.measure.bench.measure import Row, Work, phase_of, time_work
from modes_fx.measure.bench.models import block_of, build, draw, popularity, route
from modes_fx.measure.bench.options import Options
from modes_fx.measure.bench.settings import BLOCK_SETTINGS, LAYER_SETTINGS, ONE_GRAPH_SETTINGS, Contender, Twins, thresholds
from modes_fx.models.device import choose_device
from modes_fx.models.layers import Region, find_moe_layers

logger = logging.getLogger(__name__)

GROWTH_SKIPS = (0.0, 0.5, 0.75, 0.88, 0.95)

_VISUAL = 0.75  # of a prompt's tokens
_PREFILL_SKIP, _DECODE_SKIP = 0.88, 0.5
_WIDER: tuple[Region, ...] = ("layer", "model")
_CALIBRATION = 4096  # tokens that thresholds are taken from
_OTHERS = 10_000  # seeds of inputs that are not timed
_ROOM = 64  # tokens of a static cache that the prompt leaves free
_FLUSH_BYTES = 256 * 2**20


@dataclass
class Bench:
    """What was measured.

    Attributes:
        machines: One for each number of threads.
        popularity: Share of the pairs of the experts chosen most: the first, and the first tenth of them.
        rows: Times, in the order they were taken.
        overhead: See ``overhead.Overhead``; of each region that was measured.
        failed: Why a setting does not run, by name.
    """

    machines: list[Machine] = field(default_factory=list)
    popularity: tuple[float, float] = (0.0, 0.0)
    rows: list[Row] = field(default_factory=list)
    overhead: list[overhead.Overhead] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


Progress = Callable[[str, int, int], None]


def run(
    options: Options, progress: Progress = lambda part, done, total: None, keep: Callable[[Bench], None] = lambda found: None
) -> Bench:
    """Measure; torch's number of threads is afterwards as it was.

    Args:
        options: What.
        progress: Called with a part's name, steps done and steps in all.
        keep: Called with all that is measured so far, each time that there is more.
    """
    before = torch.get_num_threads()
    try:
        with torch.inference_mode():
            return _Run(options, progress, keep).all()
    finally:
        torch.set_num_threads(before)


class _Run:
    def __init__(self, options: Options, progress: Progress, keep: Callable[[Bench], None]) -> None:
        self.options, self.progress, self.keep = options, progress, keep
        self.device = choose_device(options.device)
        logger.info("building %d layers of %s with random weights", options.layers, options.preset)
        self.stack = build(options.preset, options.layers, options.skew, device=self.device)
        self.block = block_of(self.stack)
        self.width = self.stack.config.hidden_size
        self.found = Bench()
        self._drawn: tuple[tuple[int, int], Tensor] = ((0, 0), torch.empty(0))
        self._flushed = torch.ones(_FLUSH_BYTES // 4, device=self.device)
        sample = route(self.block, {"inputs_embeds": self._draw(_CALIBRATION, _OTHERS)})
        experts = next(find_moe_layers(self.block)[0].experts.parameters()).shape[0]
        shares = popularity(sample[0], experts)
        self.found.popularity = float(shares[0]), float(shares[: -(-experts // 10)].sum())
        self.block_sample = sample

    def all(self) -> Bench:
        for threads in self.options.threads or (torch.get_num_threads(),):
            torch.set_num_threads(threads)
            logger.info("measuring what this machine can do on %d threads", threads)
            machine = measure_machine(self.device)
            self.found.machines.append(machine)
            twins = Twins(self.block, self.found.failed)  # afresh: code is generated for a number of threads
            if "block" in self.options.parts:
                self._block(twins, machine)
        if "growth" in self.options.parts:
            self._growth(twins, machine)
        if "layers" in self.options.parts:
            self._layers(machine)
        if "overhead" in self.options.parts:
            self._overhead()
        return self.found

    def _block(self, twins: Twins, machine: Machine) -> None:
        taus = self._block_taus(self.options.skips)
        for tokens in self.options.tokens:
            ours = [*twins.ours(taus), *twins.packed(taus)]
            contenders = [*twins.stock(BLOCK_SETTINGS, tokens), *twins.peer(), *ours]
            self._time(self._block_work("block", tokens, machine), contenders, f"block, {machine.threads} threads, T {tokens}")

    def _growth(self, twins: Twins, machine: Machine) -> None:
        taus = self._block_taus(GROWTH_SKIPS)
        for tokens in _powers(self.options.growth_to):
            self._time(self._block_work("growth", tokens, machine), twins.ours(taus), f"growth, T {tokens}")

    def _layers(self, machine: Machine) -> None:
        twins, length = Twins(self.stack, self.found.failed), self.options.prompt
        classes = self._visual(length).long().unsqueeze(0)
        prefill = self._prefill_arguments(length)
        sample = route(self.stack, self._prefill_arguments(_CALIBRATION)(_OTHERS))
        decode, static = self._decode_arguments(), self._static_arguments()
        every = thresholds(sample, self._visual(_CALIBRATION), (0.0, _DECODE_SKIP, _PREFILL_SKIP))
        for phase, tokens, skip, ids, arguments, context in (
            ("prefill", length, _PREFILL_SKIP, classes, prefill, 0),
            ("decode", 1, _DECODE_SKIP, self._text(1), decode, self.options.cache),
        ):
            taus = {0.0: every[0.0], skip: every[skip]}
            attentions = (None, "eager") if phase == "decode" else (None,)
            contenders = [
                *twins.stock(LAYER_SETTINGS, tokens), *twins.peer(), *twins.ours(taus), *twins.packed(taus),
                *(each for how in attentions for region in _WIDER for each in twins.ours(taus, region, how)),
            ]  # fmt: skip
            if phase == "decode":
                contenders += twins.stock(ONE_GRAPH_SETTINGS, tokens)
                contenders += [each for how in attentions for each in twins.one_graph(every, how)]
            limit = self._limit(self.stack, arguments, ids, machine, context)
            work = Work("layers", phase, tokens, ids, arguments, limit, static)  # type: ignore[arg-type]
            self._time(work, contenders, f"{self.options.layers} layers, {phase}")

    def _overhead(self) -> None:
        decode, steps, token = self._decode_arguments(), 10 * self.options.rounds, self._text(1)
        for region in ("moe", "model"):
            logger.info("timing what skipping itself costs, region %s: %d decode steps", region, steps)
            self.found.overhead.append(overhead.measure(self.stack, region, decode, steps, token))
            self.keep(self.found)

    def _time(self, work: Work, contenders: list[Contender], name: str) -> None:
        rounds = self.options.rounds * (3 if work.phase == "decode" else 1)
        logger.info("timing %s: %d settings, each compiled first", name, len(contenders))
        self.found.rows += time_work(
            work, contenders, rounds, limit_s=self.options.limit_s, failed=self.found.failed, flush=self._flushed.amax,
            on_step=lambda done, total: self.progress(name, done, total),
        )  # fmt: skip
        self.keep(self.found)

    def _block_taus(self, skips: Sequence[float]) -> dict[float, tuple[float, float] | None]:
        return thresholds(self.block_sample, self._text(_CALIBRATION)[0].bool(), skips)

    def _block_work(self, part: str, tokens: int, machine: Machine) -> Work:
        classes = self._text(tokens)

        def arguments(index: int) -> dict[str, Any]:
            return {"inputs_embeds": self._draw(tokens, index)}

        return Work(part, phase_of(tokens), tokens, classes, arguments, self._limit(self.block, arguments, classes, machine, 0))

    def _prefill_arguments(self, tokens: int) -> Callable[[int], dict[str, Any]]:
        return lambda index: {"inputs_embeds": self._draw(tokens, index), "use_cache": False}

    def _decode_arguments(self) -> Callable[[int], dict[str, Any]]:
        """Return arguments of one token's step over a cache that the prompt has filled, each with a cache of its own."""
        cache = self._filled(DynamicCache(config=self.stack.config))
        return lambda index: self._step(index, copy.deepcopy(cache))

    def _static_arguments(self) -> Callable[[int], dict[str, Any]]:
        """Return the same over one static cache, put back as it was each time: CUDA graphs read it where they first saw it."""
        cache = self._filled(StaticCache(config=self.stack.config, max_cache_len=self.options.cache + _ROOM))
        before = copy.deepcopy(cache)

        def arguments(index: int) -> dict[str, Any]:
            for layer, was in zip(cache.layers, before.layers, strict=True):
                for name, value in vars(was).items():
                    if isinstance(value, Tensor):
                        getattr(layer, name).copy_(value)
            return self._step(index, cache)

        return arguments

    def _filled(self, cache: Cache) -> Cache:
        self.stack(inputs_embeds=self._draw(self.options.cache, _OTHERS + 1), past_key_values=cache, use_cache=True)
        return cache

    def _step(self, index: int, cache: Cache) -> dict[str, Any]:
        return {"inputs_embeds": self._draw(1, index), "past_key_values": cache, "use_cache": True}

    def _draw(self, tokens: int, seed: int) -> Tensor:
        if self._drawn[0] != (tokens, seed):  # all contenders of a round ask for the same
            drawn = draw(tokens, self.width, self.options.skew, _OTHERS + seed)
            self._drawn = (tokens, seed), drawn.to(self.device)
        return self._drawn[1]

    def _text(self, tokens: int) -> Tensor:
        """Return the classes of text tokens, int64 [1, T]."""
        return torch.zeros(1, tokens, dtype=torch.int64, device=self.device)

    def _visual(self, tokens: int) -> Tensor:
        """Return which tokens of a prompt are visual, bool [T]."""
        return torch.arange(tokens, device=self.device) < _VISUAL * tokens

    @staticmethod
    def _limit(
        model: Any, arguments: Callable[[int], dict[str, Any]], classes: Tensor, machine: Machine, context: int
    ) -> Callable[[int, tuple[float, float] | None], Limit]:
        """Return a function for ``Work.limit``; it takes the routing of a round from the stock model, once.

        In a stack, what a layer skips changes the inputs of the layers after it, which this leaves out.
        """
        limits, visual = Limits(model, machine), classes.reshape(-1).bool()
        routings: dict[int, Any] = {}

        def limit(index: int, taus: tuple[float, float] | None) -> Limit:
            if index not in routings:
                routings[index] = route(model, arguments(index))
            text, vision = taus or (0.0, 0.0)
            bound = torch.where(visual, vision, text).unsqueeze(1)
            kept = [routing.weights >= bound for routing in routings[index]]
            return limits(routings[index], kept, context)

        return limit


def _powers(largest: int) -> Iterator[int]:
    """Yield 1, 8, 64 ... up to, and with, the largest."""
    count = 1
    while count < largest:
        yield count
        count *= 8
    yield largest
