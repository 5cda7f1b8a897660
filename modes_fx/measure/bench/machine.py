"""What a processor or a GPU can do, measured: bandwidth of reads, rate of GEMMs; and the least time that work takes there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modes_fx.measure.bench.models import Routing
from modes_fx.measure.timing import now
from modes_fx.models.device import describe_device
from modes_fx.models.layers import MoeLayer, find_moe_layers

_TAKES = 6
_READ_BYTES = 512 * 2**20
_GEMM = 2048, 1536  # inner and outer size
_GEMM_ROWS = (128, 512, 2048)
_GPU_GEMM, _GPU_GEMM_ROWS = (8192, 8192), (8192,)  # of a millisecond or more, so that a launch is nothing


@dataclass(frozen=True)
class Machine:
    """Rates with so many threads.

    Attributes:
        threads: Threads of the measurement.
        bandwidth: Bytes read a second.
        gemm_rate: Floating-point operations a second, of bfloat16 GEMMs.
        name: What it is; see ``device.describe_device``.
    """

    threads: int
    bandwidth: float
    gemm_rate: float
    name: str = ""


@dataclass(frozen=True)
class Limit:
    """The least time that work takes: weights are read once and products computed at the measured rates.

    The two are added up. Code that reads while it computes may stay below their sum, never below the larger of them.

    Attributes:
        read_ms: Reading of the weights of experts that keep a pair in this very input, and of all else.
        gemm_ms: Products of kept pairs, and of all else.
    """

    read_ms: float
    gemm_ms: float

    @property
    def ms(self) -> float:
        """Their sum."""
        return self.read_ms + self.gemm_ms


def measure(device: torch.device) -> Machine:
    """Measure a device, with torch's present number of threads; the best of several takes counts."""
    floats = torch.ones(_READ_BYTES // 4, device=device)
    whole = floats.view(torch.int64)
    reads: Sequence[Callable[[], Any]] = (floats.amax, floats.sum, whole.max)
    bandwidth = max(_READ_BYTES / _least_seconds(read, device) for read in reads)
    (inner, outer), sizes = (_GPU_GEMM, _GPU_GEMM_ROWS) if device.type == "cuda" else (_GEMM, _GEMM_ROWS)
    weight = torch.randn(outer, inner, dtype=torch.bfloat16, device=device)
    rates = []
    for rows in sizes:
        x = torch.randn(rows, inner, dtype=torch.bfloat16, device=device)
        seconds = _least_seconds(lambda x=x: nn.functional.linear(x, weight), device)  # type: ignore[misc]
        rates.append(2 * rows * inner * outer / seconds)
    return Machine(torch.get_num_threads(), bandwidth, max(rates), describe_device(device))


def _least_seconds(run: Callable[[], Any], device: torch.device) -> float:
    seconds = []
    for _ in range(_TAKES):
        started = now(device)
        run()
        seconds.append(now(device) - started)
    return min(seconds)


class Limits:
    """Computes the limit of a block's or a stack's forwards.

    Args:
        model: The model.
        machine: Where it runs.
    """

    def __init__(self, model: Any, machine: Machine) -> None:
        self._machine = machine
        self._layers = find_moe_layers(model)
        config = model.config
        head = getattr(config, "v_head_dim", None) or getattr(config, "head_dim", None)
        heads = config.num_attention_heads * (head or config.hidden_size // config.num_attention_heads)
        self._attention_width = heads if self._layers[0].layer is not self._layers[0].block else 0

    def __call__(self, routing: Sequence[Routing], kept: Sequence[torch.Tensor], context: int = 0) -> Limit:
        """Return the limit of one forward; attention counts as full and causal, also where a model's has a window.

        Args:
            routing: Of each MoE layer.
            kept: bool [T, K] for each MoE layer, the pairs that are computed.
            context: Tokens in the cache.
        """
        read, flops = 0, 0
        for layer, where, keep in zip(self._layers, routing, kept, strict=True):
            tokens = where.ids.shape[0]
            each, others, width = _sizes(layer)
            hit = where.ids[keep].unique().numel()
            read += width * (hit * each + others)
            flops += 2 * (int(keep.sum()) * each + tokens * others)
            seen = tokens * context + tokens * (tokens + 1) // 2
            flops += 4 * seen * self._attention_width
        return Limit(1e3 * read / self._machine.bandwidth, 1e3 * flops / self._machine.gemm_rate)


def _sizes(layer: MoeLayer) -> tuple[int, int, int]:
    """Return the numbers of parameters of one expert and of all else, and the bytes of one."""
    parameters = list(layer.experts.parameters())
    experts = sum(parameter.numel() for parameter in parameters)
    others = sum(parameter.numel() for parameter in layer.layer.parameters()) - experts
    return experts // parameters[0].shape[0], others, parameters[0].element_size()
