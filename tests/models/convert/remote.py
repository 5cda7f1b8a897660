"""MoE blocks built as those published with models' weights as remote code: a ModuleList of experts and a loop over it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GatedMLP(nn.Module):
    """Expert of the DeepSeek and Qwen kind."""

    def __init__(self, hidden: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class SigmoidGate(nn.Module):
    """DeepSeek-V3's and Kimi-VL's router: sigmoid scores, a bias for the choice alone, groups."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top_k, self.n_group, self.topk_group = config.num_experts_per_tok, config.n_group, config.topk_group
        self.routed_scaling_factor, self.norm_topk_prob = config.routed_scaling_factor, config.norm_topk_prob
        self.weight = nn.Parameter(torch.randn(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Parameter(torch.rand(config.n_routed_experts))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        assert not self.training
        hidden = hidden_states.view(-1, hidden_states.shape[-1])
        scores = F.linear(hidden.type(torch.float32), self.weight.type(torch.float32)).sigmoid()
        choice = scores + self.e_score_correction_bias.unsqueeze(0)
        best_two = choice.view(len(hidden), self.n_group, -1).topk(2, dim=-1)[0].sum(dim=-1)
        groups = torch.topk(best_two, k=self.topk_group, dim=-1, sorted=False)[1]
        mask = torch.zeros_like(best_two).scatter_(1, groups, 1).unsqueeze(-1)
        allowed = mask.expand(len(hidden), self.n_group, choice.shape[1] // self.n_group).reshape(len(hidden), -1)
        topk_idx = torch.topk(choice.masked_fill(~allowed.bool(), 0.0), k=self.top_k, dim=-1, sorted=False)[1]
        topk_weight = scores.gather(1, topk_idx)
        if self.norm_topk_prob:
            topk_weight = topk_weight / (topk_weight.sum(dim=-1, keepdim=True) + 1e-20)
        return topk_idx, topk_weight * self.routed_scaling_factor


class SoftmaxGate(nn.Module):
    """The first DeepSeek-MoE's router, which also returns an auxiliary loss (None while it serves)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.randn(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, None]:
        scores = F.linear(hidden_states.view(-1, hidden_states.shape[-1]), self.weight).softmax(dim=-1)
        topk_weight, topk_idx = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
        return topk_idx, topk_weight, None


class DeepseekBlock(nn.Module):
    """The block of DeepSeek-V3 and Kimi-VL; DeepSeek-V2's and -VL2's differ in the gate."""

    def __init__(self, config: Any, ep_size: int = 1) -> None:
        super().__init__()
        self.config = config
        self.ep_size = ep_size
        mine = config.n_routed_experts // ep_size
        self.experts = nn.ModuleList(
            GatedMLP(config.hidden_size, config.moe_intermediate_size) if index < mine else None
            for index in range(config.n_routed_experts)
        )
        self.gate = SigmoidGate(config)
        if config.n_shared_experts is not None:
            self.shared_experts = GatedMLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, hidden_states: Tensor) -> Tensor:
        identity, orig_shape = hidden_states, hidden_states.shape
        topk_idx, topk_weight = self.gate(hidden_states)
        hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
        if self.training:
            raise NotImplementedError
        y = self.moe_infer(hidden_states, topk_idx, topk_weight).view(*orig_shape)
        if self.config.n_shared_experts is not None:
            y = y + self.shared_experts(identity)
        return y

    @torch.no_grad()
    def moe_infer(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor) -> Tensor:
        counts = topk_ids.new_zeros((topk_ids.shape[0], len(self.experts)))
        counts.scatter_(1, topk_ids, 1)
        tokens_per_expert = counts.sum(dim=0).cpu().numpy()
        order = topk_ids.view(-1).argsort()
        sorted_tokens = x[order // topk_ids.shape[1]]
        outputs, start = [], 0
        for index, number in enumerate(tokens_per_expert):
            if number:
                outputs.append(self.experts[index](sorted_tokens[start : start + number]))
                start += number
        result = torch.cat(outputs, dim=0)
        restored = torch.empty_like(result)
        restored[order] = result
        weighted = restored.view(*topk_ids.shape, -1).type(topk_weight.dtype).mul_(topk_weight.unsqueeze(dim=-1))
        return weighted.sum(dim=1).type(result.dtype)


class FlatDeepseekBlock(DeepseekBlock):
    """The block of the first DeepSeek-MoE: flat ids, and a sum by scatter."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.gate = SoftmaxGate(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        identity, orig_shape = hidden_states, hidden_states.shape
        topk_idx, topk_weight, _ = self.gate(hidden_states)
        hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
        y = self.moe_infer(hidden_states, topk_idx.view(-1), topk_weight.view(-1, 1)).view(*orig_shape)
        return y + self.shared_experts(identity)

    @torch.no_grad()
    def moe_infer(self, x: Tensor, flat_expert_indices: Tensor, flat_expert_weights: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        order = flat_expert_indices.argsort()
        ends = flat_expert_indices.bincount().cpu().numpy().cumsum(0)
        tokens, start = order // self.gate.top_k, 0
        for index, end in enumerate(ends):
            if start != end:
                rows = order[start:end]
                out = self.experts[index](x[tokens[start:end]]).mul_(flat_expert_weights[rows])
                result.scatter_reduce_(0, tokens[start:end].view(-1, 1).repeat(1, x.shape[-1]), out, reduce="sum")
                start = end
        return result


class MixtralMLP(nn.Module):
    """Expert of the Mixtral kind."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(hidden, width, bias=False), nn.Linear(hidden, width, bias=False)
        self.w2 = nn.Linear(width, hidden, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


class MixtralBlock(nn.Module):
    """The block of Mixtral before transformers 5: always renormalises."""

    def __init__(self, hidden: int, width: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.gate = nn.Linear(hidden, num_experts, bias=False)
        self.experts = nn.ModuleList(MixtralMLP(hidden, width) for _ in range(num_experts))

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        router_logits = self.gate(hidden)
        weights, ids = torch.topk(F.softmax(router_logits, dim=1, dtype=torch.float), self.top_k, dim=-1)
        if getattr(self, "norm_topk_prob", True):
            weights /= weights.sum(dim=-1, keepdim=True)
        return router_logits, weights.to(hidden.dtype), ids

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, width = hidden_states.shape
        hidden_states = hidden_states.view(-1, width)
        router_logits, weights, ids = self.route(hidden_states)
        result = torch.zeros((batch * length, width), dtype=hidden_states.dtype, device=hidden_states.device)
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        for index in range(self.num_experts):
            rank, token = torch.where(mask[index])
            rows = self.experts[index](hidden_states[None, token].reshape(-1, width)) * weights[token, rank, None]
            result.index_add_(0, token, rows.to(hidden_states.dtype))
        return self.shared(hidden_states, result).reshape(batch, length, width), router_logits

    def shared(self, hidden: Tensor, result: Tensor) -> Tensor:
        return result


class Qwen3Block(MixtralBlock):
    """The block of Qwen3-MoE and OLMoE before transformers 5."""

    def __init__(self, hidden: int, width: int, num_experts: int, top_k: int, norm_topk_prob: bool = True) -> None:
        super().__init__(hidden, width, num_experts, top_k)
        self.norm_topk_prob = norm_topk_prob
        self.experts = nn.ModuleList(GatedMLP(hidden, width) for _ in range(num_experts))


class Qwen2Block(Qwen3Block):
    """The block of Qwen2-MoE before transformers 5: a gated shared expert, no renormalisation."""

    def __init__(self, hidden: int, width: int, num_experts: int, top_k: int) -> None:
        super().__init__(hidden, width, num_experts, top_k, norm_topk_prob=False)
        self.shared_expert = GatedMLP(hidden, width)
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False)

    def shared(self, hidden: Tensor, result: Tensor) -> Tensor:
        return result + F.sigmoid(self.shared_expert_gate(hidden)) * self.shared_expert(hidden)


class SquaredGateBlock(MixtralBlock):
    """Mixtral's structure, another router; as Phi-3.5-MoE has."""

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        router_logits, weights, ids = super().route(hidden)
        return router_logits, weights**2, ids


class WithoutLogits(nn.Module):
    """What old decoder layers did with a block's two results."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.block(hidden_states)[0]
