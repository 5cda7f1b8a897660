"""What ``gpu_check`` measures: each part builds what it needs and yields times of stock's settings and of modes-fx, in turn."""

import copy
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache

from modes_fx.calib import layer_importance, search
from modes_fx.demo import load, make_batches
from modes_fx.errors import ModesFxError, in_a_line
from modes_fx.kernels.cuda import sizes
from modes_fx.measure.bench.models import block_of, build, draw, route
from modes_fx.measure.bench.presets import config_of
from modes_fx.measure.bench.settings import DEFAULT, Contender, Kind, Twins, thresholds
from modes_fx.measure.timing import in_turn, now
from modes_fx.measure.twins import RECOMPILE_LIMIT, Setting, stock_twin
from modes_fx.modality import token_modality
from modes_fx.optimize import optimize
from modes_fx.plan import SkipPlan

DECODE, PREFILL = (0.0, 0.5, 0.88), (0.0, 0.75, 0.88)  # skipped
OURS = "modes-fx"
TUNED, FEW = "block, 8192 tokens, max-autotune / the table's sizes", (4, 8, 16, 32, 64)  # tokens
JOBS = {"demo, {}, seconds": {}, "demo, {}, layers in CUDA graphs, seconds": {"region": "layer", "mode": "reduce-overhead"}}
"""How the demo is calibrated and searched: settings of ``optimize``."""
ROUNDS = 7
COMPILED, BATCHED, BATCHED_COMPILED = Setting("grouped_mm", "moe"), Setting("batched_mm"), Setting("batched_mm", "moe")

Key = tuple[str, float | None]
Ready = Callable[[Contender], Callable[[], float]]
Timed = tuple[dict[Key, list[float]], dict[Key, str]]
"""Milliseconds of each contender by name and skip ratio, a value a round, and why others do not run."""


@dataclass(frozen=True)
class Shapes:
    """What is built: ``language`` is laid over the config of Qwen3-30B-A3B."""

    preset: str = "qwen3-vl-30b-a3b"
    layers: int = 48
    language: Mapping[str, int] = field(default_factory=lambda: {"num_hidden_layers": 8, "vocab_size": 151_936})
    prompt: int = 2048
    new_tokens: int = 33
    tokens: int = 8192
    context: int = 1024
    memory_gb: int = 64  # of the deep stack; its weights take 60
    flush_mb: int = 256  # read before each call, to drive weights out of caches
    images: int = 12  # of the demo's calibration, and the grid of its search: as `modes-fx demo` has them
    grid: int = 14


TINY = Shapes("tiny", 2, {"num_hidden_layers": 2, "vocab_size": 256, "hidden_size": 64, "moe_intermediate_size": 32,
    "num_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    prompt=32, new_tokens=5, tokens=64, context=16, memory_gb=0, flush_mb=1, images=1, grid=3)  # fmt: skip


def generate(shapes: Shapes, device: torch.device) -> Iterator[tuple[str, Timed]]:
    """Decode with ``generate``: the time of many tokens less that of one."""
    config = config_of("internvl-3.5-30b", 1)
    config.update(shapes.language)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(3, config.vocab_size, (1, shapes.prompt), generator=torch.Generator().manual_seed(0)).to(device)
    stock, *ours = [*Twins(model).stock((DEFAULT,), 1), *Twins(model).ours(taus_of(model, {"input_ids": ids}))]

    def ready(each: Contender) -> Callable[[], float]:
        cache = {"cache_implementation": "static"} if each.static else {}

        def ms_of(tokens: int) -> float:
            model, count = each.model, {"min_new_tokens": tokens, "max_new_tokens": tokens}
            started = now(device)
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **count, **cache)
            return 1e3 * (now(device) - started)

        def a_token() -> float:
            return (ms_of(shapes.new_tokens) - ms_of(1)) / (shapes.new_tokens - 1)

        a_token()
        return a_token

    static = [replace(each, static=True) for each in (replace(stock, name="stock, static cache compiled"), *ours)]
    yield "8 layers, generate, static cache, decode", timed([stock, *static], ready)
    yield "8 layers, generate, dynamic cache, decode", timed([stock, *ours], ready)


def block(shapes: Shapes, device: torch.device) -> Iterator[tuple[str, Timed]]:
    """One MoE block against itself compiled."""
    block = block_of(build(shapes.preset, 1, device=device))
    taus = taus_of(block, {"inputs_embeds": drawn(4096, block, device)})
    for what, tokens in (("block, 1 token, graph", 1), ("block, 8192 tokens", shapes.tokens)):
        twins, x = Twins(block), drawn(tokens, block, device)
        contenders = [*twins.stock((COMPILED, BATCHED_COMPILED), tokens), *twins.ours(taus)]
        with token_modality(torch.zeros(1, tokens, dtype=torch.int64, device=device)):
            yield what, timed(contenders, caller(lambda model, x=x: model(x), shapes, device, graph=tokens == 1))


def decode(shapes: Shapes, device: torch.device) -> Iterator[tuple[str, Timed]]:
    """A step of all layers over a cache."""
    stack, taus = deep_stack(shapes, device, DECODE)
    for batch in (1, 16):
        twins, cache = Twins(stack), DynamicCache(config=stack.config)
        prompt = drawn(batch * shapes.context, stack, device).view(batch, shapes.context, -1)
        stack(inputs_embeds=prompt, past_key_values=cache, use_cache=True)
        token = drawn(batch, stack, device).view(batch, 1, -1)

        def step(model: Any, cache: Any = cache, token: Tensor = token) -> Any:
            mine = copy.copy(cache)
            mine.layers = [copy.copy(layer) for layer in cache.layers]  # a step puts new tensors in the place of theirs
            return model(inputs_embeds=token, past_key_values=mine, use_cache=True)

        contenders = [*twins.stock((DEFAULT, COMPILED, BATCHED, BATCHED_COMPILED), batch), *twins.ours(taus)]
        with token_modality(torch.zeros(batch, 1, dtype=torch.int64, device=device)):
            yield f"48 layers, decode, batch {batch}, graph", timed(contenders, caller(step, shapes, device, graph=True))


def prefill(shapes: Shapes, device: torch.device) -> Iterator[tuple[str, Timed]]:
    """A prompt through all layers, three quarters of it visual, against stock's default."""
    stack, taus = deep_stack(shapes, device, PREFILL)
    twins, x = Twins(stack), drawn(shapes.tokens, stack, device)
    contenders = [*twins.stock((DEFAULT,), shapes.tokens), *twins.ours(taus)]
    with token_modality((torch.arange(shapes.tokens, device=device) < 0.75 * shapes.tokens).long().unsqueeze(0)):
        call = caller(lambda model: model(inputs_embeds=x, use_cache=False), shapes, device, graph=False)
        yield "48 layers, prefill 8192", timed(contenders, call)


def few_pairs(tokens: int) -> str:
    """Return the line of a block that computes pairs one by one, against one that sorts them by expert."""
    return f"block, {tokens} tokens, pair by pair / sorted"


def program_sizes(shapes: Shapes, device: torch.device) -> Iterator[tuple[str, Timed]]:
    """One MoE block, half skipped: with pairs one by one against sorted, and with sizes that are tried against the table's."""
    block = block_of(build(shapes.preset, 1, device=device))
    taus = taus_of(block, {"inputs_embeds": drawn(4096, block, device)}, (0.5,))[0.5]
    plan = SkipPlan.uniform(text=taus[0], vision=taus[1])

    def contender(name: str, kind: Kind, mode: str | None = None) -> Contender:
        return Contender(name, kind, optimize(stock_twin(block, DEFAULT), plan, mode=mode), 0.5, taus)

    def against(tokens: int, mine: Contender, other: Contender, pairs: bool) -> Timed:
        x = drawn(tokens, block, device)
        call = caller(lambda model: model(x), shapes, device, graph=pairs)

        def ready(each: Contender) -> Callable[[], float]:
            most = (math.inf if each is mine else 0.0) if pairs else sizes.PAIRS_AN_EXPERT
            with patch.object(sizes, "PAIRS_AN_EXPERT", most):  # while it is compiled
                return call(each)

        with token_modality(torch.zeros(1, tokens, dtype=torch.int64, device=device)):
            return timed([mine, other], ready)

    for tokens in FEW:
        yield few_pairs(tokens), against(tokens, contender(OURS, "ours"), contender("sorted", "stock"), pairs=True)
    tuned = contender(OURS, "ours", "max-autotune-no-cudagraphs")
    yield TUNED, against(shapes.tokens, tuned, contender("the table's", "stock"), pairs=False)


def calibration(shapes: Shapes, device: torch.device) -> Iterator[tuple[str, Timed]]:
    """Calibrate and search the demo, compilation included, against a second."""
    for what, settings in JOBS.items():
        model, processor = load()
        optimize(model.to(device), **settings)
        batches = make_batches("calibration", shapes.images, processor)
        importance: Any = None
        for job in ("calibrate", "search"):
            began = time.monotonic()
            try:
                if job == "calibrate":
                    importance = layer_importance(model, batches)
                else:
                    search(model, batches, importance, grid_size=shapes.grid)
            except Exception as error:  # whatever a compiler or a GPU raises: the other settings go on
                yield what.format(job), ({}, {(OURS, None): in_a_line(error)})
                continue
            yield what.format(job), ({(OURS, None): [1e3 * (time.monotonic() - began)], ("a second", 0.0): [1e3]}, {})


PARTS = {
    "generate": generate, "block": block, "decode": decode, "prefill": prefill, "sizes": program_sizes,
    "calibration": calibration,
}  # fmt: skip


def deep_stack(shapes: Shapes, device: torch.device, skips: Sequence[float]) -> tuple[Any, Any]:
    """Return all layers and their thresholds, if they fit."""
    free = torch.cuda.mem_get_info(device)[0] / 1e9 if device.type == "cuda" else shapes.memory_gb
    if free < shapes.memory_gb:
        raise ModesFxError(f"{shapes.layers} layers need {shapes.memory_gb} GB of memory, {free:.0f} are free")
    stack = build(shapes.preset, shapes.layers, device=device)
    return stack, taus_of(stack, {"inputs_embeds": drawn(1024, stack, device), "use_cache": False}, skips)


def drawn(tokens: int, model: Any, device: torch.device) -> Tensor:
    """Return random inputs, bfloat16 [1, T, H]."""
    return draw(tokens, model.config.hidden_size, "uniform", tokens).to(device)


def taus_of(model: nn.Module, sample: Mapping[str, Any], skips: Sequence[float] = DECODE) -> Any:
    """Return thresholds by skip ratio, taken from the routing of a sample."""
    routings = route(model, sample)
    return thresholds(routings, torch.zeros_like(routings[0].ids[:, 0], dtype=torch.bool), skips)


def caller(call: Callable[[Any], Any], shapes: Shapes, device: torch.device, *, graph: bool) -> Ready:
    """Return what compiles a contender, on a GPU captures it where a graph is asked for, and returns what times a call."""
    flushed = torch.ones(shapes.flush_mb * 2**18, device=device)

    def ready(each: Contender) -> Callable[[], float]:
        for _ in range(2):
            call(each.model)
        run = captured(lambda: call(each.model)) if graph and device.type == "cuda" else None

        def ms() -> float:
            flushed.amax()
            if run is not None:
                started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                started.record()
                run()
                ended.record()
                ended.synchronize()
                return float(started.elapsed_time(ended))
            began = now(device)
            call(each.model)
            return 1e3 * (now(device) - began)

        return ms

    return ready


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """Return the replay of a call's CUDA graph."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def timed(contenders: Iterable[Contender], ready: Ready) -> Timed:
    """Time contenders in turn, each ready beforehand; those that do not run are left out."""
    runners: dict[Key, Callable[[], float]] = {}
    failed: dict[Key, str] = {}
    for each in contenders:
        key = ("modes-fx" if each.kind == "ours" else each.name, each.skip)
        limit = {} if each.kind == "ours" else {"recompile_limit": RECOMPILE_LIMIT}

        def run(measure: Callable[[], Any], each: Contender = each, limit: Mapping[str, int] = limit) -> Any:
            with torch._dynamo.config.patch(limit):
                each.prepare()
                return measure()

        try:
            runners[key] = functools.partial(run, run(functools.partial(ready, each)))
        except Exception as error:  # whatever a model's code, a compiler or a GPU raises: the others go on
            failed[key] = in_a_line(error)
    return in_turn(runners, ROUNDS, 1), failed
