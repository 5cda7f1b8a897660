"""The kernel for linear layers that meet few rows against ATen's product: which rows it should take.

    python benchmarks/few_rows.py [--threads 1,2] [--rounds 7]

Weights [N, D] of a router and of projections of Qwen3-VL-30B-A3B; each call reads another copy, so that none is in a cache. In
turn; median over rounds of the kernel's time / ATen's. Beyond ``ops.FEW_ROWS`` it calls ATen itself: about 1 there.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor, nn

import modes_fx  # noqa: F401 - it defines the kernels
from modes_fx.measure.timing import in_turn
from modes_fx.models.device import cpu_name

SHAPES = ((128, 2048), (512, 2048), (4096, 2048), (2048, 4096))
ROWS = (1, 2, 4, 8, 16, 17)
COPIES_BYTES = 300e6


def seconds_of(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> float:
    """Return the time of one product with each weight."""
    started = time.perf_counter()
    for weight in weights:
        product(x, weight)
    return time.perf_counter() - started


def ratios(shape: tuple[int, int], dtype: torch.dtype, rounds: int) -> list[float]:
    """Return the kernel's time / ATen's for each of ``ROWS``."""
    outer, inner = shape
    copies = int(COPIES_BYTES / (outer * inner * dtype.itemsize))
    weights = [torch.randn(shape, dtype=dtype) for _ in range(copies)]
    found = []
    for rows in ROWS:
        x = torch.randn(rows, inner, dtype=dtype)
        times = in_turn(
            {
                "ours": lambda x=x: seconds_of(lambda x, weight: torch.ops.modes_fx.dense(x, weight, None), x, weights),
                "ATen": lambda x=x: seconds_of(nn.functional.linear, x, weights),
            },
            rounds,
            warm_up=1,
        )
        found.append(statistics.median(mine / other for mine, other in zip(times["ours"], times["ATen"], strict=True)))
    return found


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    table = []
    for threads in map(int, options.threads.split(",")):
        torch.set_num_threads(threads)
        for dtype in (torch.bfloat16, torch.float32):
            for shape in SHAPES:
                name = f"{str(dtype)[6:]} [{shape[0]}, {shape[1]}]"
                table.append((threads, name, *(f"{ratio:.2f}" for ratio in ratios(shape, dtype, options.rounds))))
    print(f"{cpu_name()}, torch {torch.__version__}: time / ATen's, by rows")
    print(tabulate(table, headers=("threads", "weight", *map(str, ROWS)), disable_numparse=True))


if __name__ == "__main__":
    main()
