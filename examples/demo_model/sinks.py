"""Attention with sinks for training on a CPU, by torch's flash attention instead of whole [S, S] scores: twice as fast a step.

A sink is one more key whose score is a parameter of its head and whose value is 0. With lse the logarithm of the sum of a
row's exponentials without it and lse' = log(exp(lse) + exp(sink)), the output is that without it times exp(lse - lse').
Flash attention's backward needs of the softmax only that number and the output (Dao et al., FlashAttention, arXiv
2205.14135, appendix B.4): given lse' and the scaled output it yields the gradients with a sink, and the sink's own is
-exp(sink - lse') sum(grad * output).
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

SINKS = "fused_sinks"


class _Attention(torch.autograd.Function):
    """q, k, v float32 [B, N, S, D]; mask float32 [B, 1, S, S], to be added; sinks [N]."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks_N: Tensor, scale: float) -> Tensor:
        forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse_BNS = forward(q, k, v, 0.0, mask is None and q.shape[2] > 1, attn_mask=mask, scale=scale)
        with_sink_BNS = torch.logaddexp(lse_BNS, sinks_N.view(1, -1, 1).to(lse_BNS.dtype))
        out = out * (lse_BNS - with_sink_BNS).exp().unsqueeze(-1)
        ctx.save_for_backward(q, k, v, mask, sinks_N, out, with_sink_BNS)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, sinks_N, out, with_sink_BNS = ctx.saved_tensors
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        is_causal = mask is None and q.shape[2] > 1
        grads = backward(grad, q, k, v, out, with_sink_BNS, 0.0, is_causal, attn_mask=mask, scale=ctx.scale)
        on_sink_BNS = (sinks_N.view(1, -1, 1) - with_sink_BNS).exp()
        return *grads, None, -(on_sink_BNS * (grad * out).sum(-1)).sum((0, 2)), None


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: object
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    return _Attention.apply(query, key, value, attention_mask, module.sinks, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register(SINKS, _attend)
AttentionMaskInterface.register(SINKS, eager_mask)
