"""vLLM on this CPU with the plug-in against vLLM without: prefill and decode of two layers of Qwen3-30B-A3B's shape.

    python benchmarks/serving.py [--prefill 2048] [--decode 24] [--rounds 6] [--threads 2] [--compile]

Random weights (2.6 GB in bfloat16), one request at a time, in an environment with vLLM (`make test-vllm` makes one). Two
engines in one process, one of which has the plug-in, whose target is changed as it runs. They take turns step by step, so that
whatever else the machine does meets both alike: median over all steps of the times without / with. A step of prefill computes
the whole prompt, one of decode the token that follows. The engines exchange the memory of their experts' weights after each
round: with the same code in both, one was up to 3% faster than the other by where its weights lay.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}

import torch
from tabulate import tabulate
from transformers import Qwen3MoeConfig

from modes_fx.models.device import cpu_name
from modes_fx.plan import PlanPoint, SkipPlan

SHAPE = {
    "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 2, "norm_topk_prob": True, "vocab_size": 1024,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip


def start(folder: Path, plan: SkipPlan | None, options: argparse.Namespace) -> Any:
    """Start an engine on random weights: the same in each, as they depend on the seed alone."""
    from vllm import LLM
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    DummyModelLoader.load_weights = lambda _, model, __: fill(model)  # vLLM's own weights route all tokens alike
    settings = {} if plan is None else {"modes_fx": {"plan": str(plan.save(folder / f"{id(plan)}.json"))}}
    return LLM(
        model=str(folder), load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True, enforce_eager=not options.compile,
        max_model_len=options.prefill + options.decode + 64, max_num_batched_tokens=options.prefill + 64, max_num_seqs=4,
        kv_cache_memory_bytes=1 << 27, enable_prefix_caching=False, additional_config=settings, disable_log_stats=True,
    )  # fmt: skip


def fill(model: torch.nn.Module) -> None:
    """Fill a model with weights by which routers choose as trained ones do: some experts much before others."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
        else:
            scale = 1.0 if "embed" in name else (1.5 if "mlp.gate." in name else 1.0) * parameter.shape[-1] ** -0.5
            parameter.data.copy_(torch.randn(parameter.shape[-2:], generator=generator) * scale)  # of experts, all alike


_names = itertools.count()


def ask(llm: Any, length: int, tokens: int, seed: int) -> None:
    """Add a request, which the next step begins."""
    from vllm import SamplingParams

    ids = torch.randint(SHAPE["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    llm.llm_engine.add_request(str(next(_names)), {"prompt_token_ids": ids}, sampling)


def step(llm: Any) -> float:
    """Return the time of an engine's next step."""
    started = time.perf_counter()
    llm.llm_engine.step()
    return time.perf_counter() - started


def moe_layers(llm: Any) -> list[Any]:
    """Return the MoE layers of an engine in this process."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return [module for module in worker.get_model().modules() if hasattr(module, "routed_experts")]


def exchange_weights(llms: list[Any]) -> None:
    """Let each of two engines read its experts' weights where the other did; they are the same."""
    for one, other in zip(*map(moe_layers, llms), strict=True):
        for mine, theirs in zip(one.routed_experts.parameters(), other.routed_experts.parameters(), strict=True):
            mine.data, theirs.data = theirs.data, mine.data


def routing_weights(llm: Any, length: int) -> torch.Tensor:
    """Return the routing weights of one request, [pairs]: to find thresholds that skip a given part of them."""
    seen: list[torch.Tensor] = []
    layers = moe_layers(llm)
    for layer in layers:
        choose = layer.router._compute_routing
        layer.router._compute_routing = lambda *args, _choose=choose, **kwargs: _note(seen, _choose(*args, **kwargs))
    ask(llm, length, 1, seed=0)
    step(llm)
    for layer in layers:
        del layer.router._compute_routing
    return torch.cat([each.flatten() for each in seen])


def _note(seen: list[torch.Tensor], routed: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    seen.append(routed[0].float().clone())
    return routed


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefill", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=24, help="tokens generated")
    parser.add_argument("--rounds", type=int, default=6, help="even, for each memory to serve both alike")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.88])
    parser.add_argument("--compile", action="store_true", help="let vLLM compile, as it does unless told not to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Qwen3MoeConfig(**SHAPE, architectures=["Qwen3MoeForCausalLM"], dtype="bfloat16").save_pretrained(folder)
        without = start(folder, None, options)
        weights = routing_weights(without, min(options.prefill, 256))
        targets = [0.0, *options.ratios]
        bounds = [0.0, *(float(weights.quantile(ratio)) for ratio in options.ratios)]
        plan = SkipPlan(points=tuple(PlanPoint(*each, each[1]) for each in zip(targets, bounds, strict=True)))
        served = start(folder, plan, options)
        found = {phase: measure([without, served], targets, options, phase) for phase in ("prefill", "decode")}
    rows = [
        [phase, f"{1e3 * statistics.median(old for steps in times.values() for old, _ in steps):.1f}"]
        + [f"{speed_up(times[target]):.2f} ({skipped[target]:.0%})" for target in targets]
        for phase, (times, skipped) in found.items()
    ]
    print(f"{cpu_name()}, {options.threads} threads, torch {torch.__version__}, {'compiled' if options.compile else 'eager'}")
    print(tabulate(rows, headers=["", "without, ms", *(f"skip {target:.0%}" for target in targets)], disable_numparse=True))


Steps = list[tuple[float, float]]  # times without and with


def measure(
    llms: list[Any], targets: list[float], options: argparse.Namespace, phase: str
) -> tuple[dict[float, Steps], dict[float, float]]:
    """Return the times of steps for each target, and what was skipped; llms are an engine without and one with the plug-in."""
    times: dict[float, Steps] = {target: [] for target in targets}
    skipped: dict[float, float] = {}
    length, tokens = (options.prefill, 1) if phase == "prefill" else (16, options.decode + 1)
    for index in range(options.rounds + 1):
        for target in targets:
            llms[1].collective_rpc("modes_fx_set_target", args=(target, target))
            before = pairs(llms[1])
            for llm in llms:
                ask(llm, length, tokens, seed=index)
            first = [in_turn(llms, index // 2)]  # the memory changes each round
            steps = [in_turn(llms, index + each) for each in range(tokens - 1)] or first
            if index:  # the round before the first warms up
                times[target] += steps
            grown = [new - old for new, old in zip(pairs(llms[1]), before, strict=True)]
            phases = [2, 3, 6, 7] if phase == "decode" else [0, 1, 4, 5]
            routed, kept = (sum(grown[each] for each in phases[start::2]) for start in (0, 1))
            skipped[target] = 1 - kept / routed
        exchange_weights(llms)
    return times, skipped


def in_turn(llms: list[Any], turn: int) -> tuple[float, float]:
    """Return the times of one step of each engine; who is first changes from turn to turn."""
    if turn % 2:
        return step(llms[0]), step(llms[1])
    with_it = step(llms[1])
    return step(llms[0]), with_it


def pairs(llm: Any) -> list[int]:
    """Return the pairs routed and kept so far."""
    (found,) = llm.collective_rpc("modes_fx_pairs")
    return list(found)


def speed_up(steps: Steps) -> float:
    """Return the median of the times without / with."""
    return statistics.median(old / new for old, new in steps)


if __name__ == "__main__":
    main()
