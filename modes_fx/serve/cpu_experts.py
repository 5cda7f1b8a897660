"""vLLM's own CPU kernel on the kept pairs alone: each a row of its own, with one expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[..., None]
"""``kernel(output_NH, hidden_NH, weights_NK, ids_NK)``."""


def dispatch_kept(
    kernel: Kernel, output_TH: Tensor, hidden_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor, num_experts: int
) -> None:
    """Compute experts over kept pairs; sums are float32.

    Args:
        kernel: Computes experts over rows.
        output_TH: Where the result goes.
        hidden_TH: One row a token.
        weights_TK: float32.
        ids_TK: int32; ``num_experts`` marks a dropped pair.
        num_experts: E.
    """
    keep_TK = ids_TK < num_experts
    kept = int(keep_TK.sum())
    if kept == ids_TK.numel():
        kernel(output_TH, hidden_TH, weights_TK, ids_TK)
        return
    if not kept:
        output_TH.zero_()
        return
    token_N, rank_N = keep_TK.nonzero(as_tuple=True)
    out_NH = torch.empty(kept, output_TH.shape[1], dtype=output_TH.dtype)
    weights_N1, ids_N1 = (each[token_N, rank_N].unsqueeze(1) for each in (weights_TK, ids_TK))
    kernel(out_NH, hidden_TH[token_N], weights_N1, ids_N1)
    if output_TH.shape[0] == 1:
        output_TH.copy_(out_NH.sum(dim=0, keepdim=True, dtype=torch.float32))
        return
    total_TH = torch.zeros(output_TH.shape, dtype=torch.float32)
    output_TH.copy_(total_TH.index_add_(0, token_N, out_NH.float()))


@torch.library.custom_op("modes_fx::serve_cpu_experts", mutates_args=("output",))
def serve_cpu_experts(
    output: Tensor,
    hidden: Tensor,
    w1: Tensor,
    w2: Tensor,
    w1_bias: Tensor | None,
    w2_bias: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    activation: str,
    isa: str,
    skip_weighted: bool,
    num_experts: int,
) -> None:
    """Put the sum of each token's kept experts into ``output`` [T, H]; arguments as of vLLM's ``cpu_fused_moe``."""
    from vllm._custom_ops import cpu_fused_moe

    def kernel(output_NH: Tensor, hidden_NH: Tensor, weights_NK: Tensor, ids_NK: Tensor) -> None:
        cpu_fused_moe(
            output_NH, hidden_NH, w1, w2, w1_bias, w2_bias, weights_NK, ids_NK, activation, isa, skip_weighted
        )  # fmt: skip

    dispatch_kept(kernel, output, hidden, weights, ids, num_experts)


def skipping_apply(experts: Any, num_experts: int) -> Callable[..., None]:
    """Return what computes kept pairs in the place of ``CPUUnquantizedExperts.apply``."""

    def apply(
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,
        apply_router_weight_on_input: bool,
        **_: Any,
    ) -> None:
        torch.ops.modes_fx.serve_cpu_experts(
            output, hidden_states, w1, w2, experts.w1_bias, experts.w2_bias, topk_weights, topk_ids, activation.value,
            experts.isa, apply_router_weight_on_input, num_experts,
        )  # fmt: skip

    return apply
