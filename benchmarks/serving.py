"""vLLM on this CPU with the plug-in against vLLM without: prefill and decode of two layers of Qwen3-30B-A3B's shape.

    python benchmarks/serving.py [--prefill 2048] [--decode 16] [--rounds 7] [--threads 2] [--compile]

Random weights (2.6 GB in bfloat16), one request at a time, in an environment with vLLM (`make test-vllm` makes one). Two
engines in one process, one of which has the plug-in, whose target is changed as it runs; measured in turn, median over rounds
of the times without / with. Prefill is the time to the first token, decode the time of each that follows.
"""

import argparse
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


def worker_of(llm: Any) -> Any:
    """Return the worker of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def seconds(llm: Any, length: int, tokens: int, seed: int) -> float:
    """Return the time of one request."""
    from vllm import SamplingParams

    ids = torch.randint(SHAPE["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    return time.perf_counter() - started


def routing_weights(llm: Any, length: int) -> torch.Tensor:
    """Return the routing weights of one request, [pairs]: to find thresholds that skip a given part of them."""
    seen: list[torch.Tensor] = []
    layers = [module for module in worker_of(llm).get_model().modules() if hasattr(module, "routed_experts")]
    for layer in layers:
        choose = layer.router._compute_routing
        layer.router._compute_routing = lambda *args, _choose=choose, **kwargs: _note(seen, _choose(*args, **kwargs))
    seconds(llm, length, 1, seed=0)
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
    parser.add_argument("--decode", type=int, default=16, help="tokens generated")
    parser.add_argument("--rounds", type=int, default=7)
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
        found = {phase: measure(without, served, targets, options, phase) for phase in ("prefill", "decode")}
    rows = [
        [phase, f"{1e3 * statistics.median(times[None]):.1f}"]
        + [f"{speed_up(times[None], times[target]):.2f} ({skipped[target]:.0%})" for target in targets]
        for phase, (times, skipped) in found.items()
    ]
    print(f"{cpu_name()}, {options.threads} threads, torch {torch.__version__}, {'compiled' if options.compile else 'eager'}")
    print(tabulate(rows, headers=["", "without, ms", *(f"skip {target:.0%}" for target in targets)], disable_numparse=True))


Times = dict[float | None, list[float]]


def measure(
    without: Any, served: Any, targets: list[float], options: argparse.Namespace, phase: str
) -> tuple[Times, dict[float, float]]:
    """Return times round by round, the first left out, without the plug-in (None) and for each target; and what was skipped."""
    times: Times = {key: [] for key in (None, *targets)}
    skipped = {}
    for index in range(options.rounds + 1):
        for target in (None, *targets):
            llm = without if target is None else served
            if target is not None:
                llm.collective_rpc("modes_fx_set_target", args=(target, target))
            before = None if target is None else pairs(llm)
            if phase == "prefill":
                times[target].append(seconds(llm, options.prefill, 1, seed=index))
            else:
                more = seconds(llm, 16, options.decode + 1, seed=index) - seconds(llm, 16, 1, seed=index)
                times[target].append(more / options.decode)
            if before is not None and target is not None:
                grown = [new - old for new, old in zip(pairs(llm), before, strict=True)]
                skipped[target] = 1 - sum(grown[1::2]) / sum(grown[::2])
    return {key: each[1:] for key, each in times.items()}, skipped


def pairs(llm: Any) -> list[int]:
    """Return the pairs routed and kept so far."""
    (found,) = llm.collective_rpc("modes_fx_pairs")
    return list(found)


def speed_up(without: list[float], other: list[float]) -> float:
    """Return the median over rounds of the times without / with."""
    return statistics.median(old / new for old, new in zip(without, other, strict=True))


if __name__ == "__main__":
    main()
