"""vLLM's own CPU kernel on the kept pairs alone: each a row of its own, with one expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modes_fx.serve.thresholds import Thresholds

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
        weights_TK: float32, contiguous.
        ids_TK: int32, contiguous; ``num_experts`` marks a dropped pair.
        num_experts: E.
    """
    pair_N = (ids_TK < num_experts).view(-1).nonzero().squeeze(1)
    kept = pair_N.shape[0]
    if kept == ids_TK.numel():
        kernel(output_TH, hidden_TH, weights_TK, ids_TK)
        return
    if not kept:
        output_TH.zero_()
        return
    weights_N, ids_N = (each.view(-1).index_select(0, pair_N) for each in (weights_TK, ids_TK))
    if output_TH.shape[0] == 1:  # one token with fewer experts is what the kernel knows already
        kernel(output_TH, hidden_TH, weights_N.unsqueeze(0), ids_N.unsqueeze(0))
        return
    token_N = pair_N // ids_TK.shape[1]
    out_NH = torch.empty(kept, output_TH.shape[1], dtype=output_TH.dtype)
    kernel(out_NH, hidden_TH.index_select(0, token_N), weights_N.unsqueeze(1), ids_N.unsqueeze(1))
    total_TH = torch.zeros(output_TH.shape, dtype=torch.float32)
    output_TH.copy_(total_TH.index_add_(0, token_N, out_NH.float()))


def _serve_cpu_experts(
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

    def kernel(output_NH: Tensor, hidden_NH: Tensor, weights_NK: Tensor, ids_NK: Tensor) -> None:
        torch.ops._C.cpu_fused_moe(
            output_NH, hidden_NH, w1, w2, w1_bias, w2_bias, weights_NK, ids_NK, skip_weighted, activation, isa
        )  # fmt: skip

    dispatch_kept(kernel, output, hidden, weights, ids, num_experts)


_library = torch.library.Library("modes_fx", "FRAGMENT")  # for less between a call and the kernel than ``custom_op`` has
_library.define(
    "serve_cpu_experts(Tensor(a!) output, Tensor hidden, Tensor w1, Tensor w2, Tensor? w1_bias, Tensor? w2_bias, "
    "Tensor weights, Tensor ids, str activation, str isa, bool skip_weighted, int num_experts) -> ()"
)
_library.impl("serve_cpu_experts", _serve_cpu_experts, "CPU")
torch.library.register_fake("modes_fx::serve_cpu_experts", lambda *_: None, lib=_library)


def skipping_apply(experts: Any, thresholds: Thresholds, num_experts: int) -> Callable[..., None]:
    """Return what computes kept pairs in the place of ``CPUUnquantizedExperts.apply``."""
    inner = experts.apply

    def apply(**given: Any) -> None:
        if thresholds.idle and not torch.compiler.is_compiling():
            inner(**given)
            return
        torch.ops.modes_fx.serve_cpu_experts(
            given["output"], given["hidden_states"], given["w1"], given["w2"], experts.w1_bias, experts.w2_bias,
            given["topk_weights"], given["topk_ids"], given["activation"].value, experts.isa,
            given["apply_router_weight_on_input"], num_experts,
        )  # fmt: skip

    return apply
