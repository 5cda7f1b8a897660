"""Time one MoE block of Qwen3-VL-30B-A3B: stock settings against modes-fx, nothing and most pairs skipped.

Random weights and inputs (near-uniform routing), bfloat16, prefill and decode lengths apart. All settings run once a round,
so that a busy moment of the machine hits all alike; medians, and ratios to the fastest stock setting.

    python benchmarks/moe_block.py [--tokens 1,64,512] [--skip 0,0.5,0.88] [--threads 2] [--rounds 9] [--json FILE]
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from transformers import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock

import modes_fx
from modes_fx.demo.timing import cpu_name
from modes_fx.files import write_atomically

SHAPE = {"hidden_size": 2048, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}


class Block(nn.Module):
    """One MoE block as a model of its own, so that ``optimize`` takes it."""

    def __init__(self, config: Qwen3VLMoeTextConfig) -> None:
        """Build the block with random weights."""
        super().__init__()
        self.config = config
        self.mlp = Qwen3VLMoeTextSparseMoeBlock(config)
        for parameter in self.mlp.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        """Run the block on [1, T, H]."""
        return self.mlp(inputs_embeds)


def build(implementation: str, weights: dict[str, Tensor] | None = None) -> Block:
    """Return a block; ``weights`` are shared, not copied."""
    config = Qwen3VLMoeTextConfig(**SHAPE)
    config._experts_implementation = implementation
    with torch.device("meta" if weights else "cpu"):
        block = Block(config).to(torch.bfloat16)
    if weights:
        block.load_state_dict(weights, assign=True)
    return block.eval()


def thresholds(block: Block, skips: list[float]) -> dict[float, float]:
    """Return, for each skip ratio, the threshold on the dispatched weights that reaches it on random inputs."""
    _, weights, _ = block.mlp.gate(torch.randn(4096, SHAPE["hidden_size"], dtype=torch.bfloat16))
    return {skip: float(torch.quantile(weights.float(), skip)) for skip in skips if skip}


def measure(tokens: list[int], skips: list[float], rounds: int) -> list[dict[str, Any]]:
    """Return one row for each token count and setting."""
    stock = build("grouped_mm")
    weights = dict(stock.state_dict())
    looped, compiled, ours = build("eager", weights), build("grouped_mm", weights), build("grouped_mm", weights)
    compiled.mlp.compile()
    modes_fx.optimize(ours)
    taus = thresholds(stock, skips)

    def skipping(skip: float) -> Block:
        tau = taus.get(skip, 0.0)
        modes_fx.set_plan(ours, modes_fx.SkipPlan.uniform(text=tau, vision=tau) if tau else None)
        return ours

    settings: dict[str, Callable[[], Block]] = {
        "stock": lambda: stock,
        "stock, expert loop": lambda: looped,
        "stock compiled": lambda: compiled,
        **{f"modes-fx, {skip:.0%} skipped": partial(skipping, skip) for skip in skips},
    }
    rows = []
    for count in tokens:
        times: dict[str, list[float]] = {name: [] for name in settings}
        for index in range(rounds + 2):
            hidden = torch.randn(1, count, SHAPE["hidden_size"], dtype=torch.bfloat16)
            for name, prepare in settings.items():
                block = prepare()
                started = time.perf_counter()
                block(hidden)
                if index >= 2:
                    times[name].append((time.perf_counter() - started) * 1e3)
        medians = {name: statistics.median(values) for name, values in times.items()}
        best = min(value for name, value in medians.items() if name.startswith("stock"))
        rows += [{"tokens": count, "setting": name, "ms": ms, "to_best_stock": ms / best} for name, ms in medians.items()]
    return rows


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="1,64,512", help="token counts, comma-separated")
    parser.add_argument("--skip", default="0,0.5,0.88", help="skip ratios, comma-separated")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = measure(
            [int(item) for item in options.tokens.split(",")], [float(item) for item in options.skip.split(",")], options.rounds
        )
    shape = ", ".join(f"{key} {value}" for key, value in SHAPE.items())
    print(f"One MoE block ({shape}), bfloat16, {options.threads} threads, {cpu_name()}, torch {torch.__version__}")
    print(
        tabulate(
            [row.values() for row in rows], headers=["tokens", "setting", "ms", "x best stock"], floatfmt=("", "", ".2f", ".2f")
        )
    )
    if options.json:
        write_atomically(options.json, json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
