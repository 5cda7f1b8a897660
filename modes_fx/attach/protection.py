"""Which tokens matter most to later ones, told layer by layer while the model runs; for rules that protect them (MC-MoE).

A token's importance in a layer is ``|t|_1 * mean attention that later tokens pay it``, averaged over heads, with t the hidden
state that enters the decoder layer. In each sequence the top 2% of the tokens, one at least, are protected there; padding is no
token. Decode steps have no later tokens and protect nothing. Source: MC-MoE, arXiv 2410.06270.

NOTE [why not eager attention] Eager attention would hold all heads' probabilities of the whole batch in every layer. Here the
output stays with ``scaled_dot_product_attention``; beside it the probabilities are computed again, from the same queries and
keys, and only their column means are kept. That costs a second product of queries and keys and a softmax in each layer, and
S**2 numbers a head in float32, for one sequence at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modes_fx.attach.watch import Watch
from modes_fx.errors import ModelError
from modes_fx.graph.running import RUNNING, Forward
from modes_fx.graph.runtime import Runtime
from modes_fx.modality import CLASSES, PADDING
from modes_fx.models.layers import MoeLayer
from modes_fx.models.sharding import has_sharded_heads

IMPLEMENTATION = "modes_fx_observed"
SHARE = 0.02


class LayerWatch(Watch):
    """Publishes a forward of its own for one decoder layer, whose attention then marks the tokens to protect."""

    def _forward(self, outer: Forward | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Forward | None:
        if outer is None or outer.phase == "decode" or not outer.ids.dim():
            return outer
        hidden = args[0] if args else kwargs["hidden_states"]
        mine = outer.narrowed(outer.ids, outer.phase, outer.expert_groups)
        mine.norms = hidden.detach().abs().sum(dim=-1, dtype=torch.float32)
        return mine


def watch_attention(layers: Sequence[MoeLayer], runtime: Runtime) -> tuple[list[Watch], list[tuple[Any, str]]]:
    """Observe the attention of each MoE layer.

    Returns:
        Watches in front of the decoder layers; and the configs that name another attention implementation now, each with the
        name that it had.

    Raises:
        ModelError: Attention is none that can be observed, or not here.
    """
    if reason := why_unobserved(layers):
        raise ModelError(reason)
    blocks, named = _blocks(layers), _named(layers)
    for config, _ in named:
        config._attn_implementation = IMPLEMENTATION
    return [LayerWatch(block, runtime) for block in blocks], named


def why_unobserved(layers: Sequence[MoeLayer]) -> str:
    """Return why the attention of MoE layers cannot be observed, and what to do; nothing if it can."""
    names = [name for _, name in _named(layers)]
    others = sorted({str(name) for name in names if name != "sdpa"})
    if others or not names:
        return (
            f"A rule that protects tokens observes attention that runs as sdpa; this model's runs as {others or 'none'}. "
            'Load it with attn_implementation="sdpa", or, where its class has none, choose a rule that protects none: naee.'
        )
    if any(has_sharded_heads(layer.layer, layer.block) for layer in layers):
        return (
            "A rule that protects tokens observes all attention heads, and here (tensor parallelism) each process sees some. "
            "Choose a rule that protects none: naee."
        )
    return ""


def _blocks(layers: Sequence[MoeLayer]) -> list[nn.Module]:
    return list({id(layer.layer): layer.layer for layer in layers}.values())


def _named(layers: Sequence[MoeLayer]) -> list[tuple[Any, str]]:
    """Return the configs of layers that name an attention implementation, and the name."""
    found: Iterator[Any] = (getattr(module, "config", None) for block in _blocks(layers) for module in block.modules())
    configs = {id(config): config for config in found if hasattr(config, "_attn_implementation")}.values()
    return [(config, config._attn_implementation) for config in configs]


def observed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Run sdpa, and mark the tokens to protect; transformers calls this under the name ``modes_fx_observed``."""
    forward = RUNNING.forward
    if forward is not None and forward.norms is not None and not forward.observed and query.shape[2] == forward.ids.shape[1]:
        with torch.no_grad():  # a layer that attends twice (to itself, then to an encoder) is judged by the first
            _protect(forward, attention_received(query, key, attention_mask, scaling, forward.ids != PADDING))
    output: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return output


def attention_received(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None, real: Tensor) -> Tensor:
    """Return the mean attention that each token receives from the later tokens of its sequence, over heads.

    Args:
        query: [B, heads, S, D].
        key: [B, key heads, S or more, D]; what is more comes first.
        mask: Bool (True: may look) or additive, [B or 1, 1 or heads, S, keys]; None is causal.
        scaling: Of the scores; None is ``D**-0.5``.
        real: bool [B, S], False for padding.

    Returns:
        float32 [B, S]; 0 for a token without a later one.
    """
    length = query.shape[2]
    if mask is None:
        key = key[:, :, :length]  # a static cache is longer than what it holds
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device).tril()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    later = torch.ones(length, length, dtype=torch.bool, device=query.device).tril(-1)  # [from, to]
    received = []
    for row in range(len(query)):  # one sequence at a time: all heads' probabilities of a batch would not fit
        scores = query[row].float() @ key[row].float().transpose(1, 2) * scale
        allowed = mask[row % len(mask)][..., : key.shape[2]]
        scores = scores.masked_fill(~allowed, -math.inf) if allowed.dtype == torch.bool else scores + allowed.float()
        paid = scores.softmax(dim=-1).mean(dim=0)[:, -length:]
        counts = later & real[row].to(query.device).unsqueeze(1)
        # where, not a product: a row of padding that may look at nothing is NaN
        received.append(torch.where(counts, paid, 0.0).sum(dim=0) / counts.sum(dim=0).clamp(min=1))
    return torch.stack(received)


def protected(importance: Tensor, real: Tensor) -> Tensor:
    """Return the top 2% of each sequence's tokens, one at least; ties go to the earlier token.

    Args:
        importance: [B, S].
        real: bool [B, S], False for padding.
    """
    order = importance.masked_fill(~real, -math.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    count = (real.sum(dim=1, keepdim=True) * SHARE).ceil()
    return (rank < count) & real


def _protect(forward: Forward, received: Tensor) -> None:
    assert forward.norms is not None
    ids = forward.ids
    mine = protected(forward.norms.to(received.device) * received, (ids != PADDING).to(received.device))
    forward.observe(ids + CLASSES * mine.to(ids.device))


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, observed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, sdpa_mask)
