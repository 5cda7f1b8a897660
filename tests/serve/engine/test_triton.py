"""vLLM's Triton experts with the extended map: their own code, around the contracts of the three kernels that it calls.

Those need a GPU; here they do in torch what their sources say. What nobody may read is NaN.
"""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from vllm.model_executor.layers.fused_moe import fused_moe, moe_align_block_size
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.model_executor.layers.fused_moe.experts import triton_moe

from modes_fx.serve.triton_experts import extended_map, skipping_apply

TOKENS, HIDDEN, INNER, EXPERTS, TOP_K, BLOCK = 24, 16, 8, 6, 3, 4


def align(
    topk_ids: Tensor,
    num_experts: int,
    block: int,
    sorted_ids: Tensor,
    expert_ids: Tensor,
    total: Tensor,
    map_: Any,
    scatter: Any,
) -> None:
    """csrc/moe/moe_align_sum_kernels.cu: with a map, pairs that it sends to -1 are neither counted nor sorted."""
    assert int(topk_ids.max()) < num_experts
    assert map_ is not None
    sorted_ids.fill_(topk_ids.numel())
    at = 0
    local = map_[topk_ids.flatten().long()]
    for expert in range(num_experts):
        mine = (local == expert).nonzero().flatten()
        for start in range(0, len(mine), BLOCK):
            part = mine[start : start + BLOCK]
            sorted_ids[at : at + len(part)] = part
            expert_ids[at // block] = expert
            at += block
    total.fill_(at)


class Kernels:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks: list[int] = []
        monkeypatch.setattr(moe_align_block_size.ops, "moe_align_block_size", align)
        monkeypatch.setattr(triton_moe, "invoke_fused_moe_triton_kernel", self.multiply)
        monkeypatch.setattr(triton_moe.ops, "moe_sum", self.add_up)
        monkeypatch.setattr(triton_moe, "tl", SimpleNamespace(float32=None))  # a name for the kernel to be compiled with
        monkeypatch.setattr(triton_moe, "try_get_optimal_moe_config", lambda *_, **__: {"BLOCK_SIZE_M": BLOCK})
        assert fused_moe._prepare_expert_assignment is triton_moe._prepare_expert_assignment

    def multiply(
        self, a: Tensor, b: Tensor, c: Tensor, a_scale: Any, b_scale: Any, weights: Tensor | None, sorted_ids: Tensor,
        expert_ids: Tensor, total: Tensor, weighted: bool, top_k: int, config: Any, **_: Any,
    ) -> None:  # fmt: skip
        """fused_moe_kernel: a block of sorted pairs of one expert at a time."""
        rows = c.view(-1, c.shape[-1])
        self.blocks.append(int(total) // BLOCK)
        for block in range(int(total) // BLOCK):
            pairs = sorted_ids[block * BLOCK : (block + 1) * BLOCK].long()
            pairs = pairs[pairs < len(rows)]
            product = a[pairs // top_k] @ b[expert_ids[block]].T
            rows[pairs] = product * weights.flatten()[pairs, None] if weighted and weights is not None else product

    def add_up(self, rows: Tensor, output: Tensor, ids: Tensor, map_: Tensor) -> None:
        """moe_sum: slots that the map sends to -1 are left out."""
        output.copy_(torch.where((map_[ids.long()] >= 0).unsqueeze(2), rows, 0).sum(dim=1))


@pytest.mark.parametrize("own", [range(EXPERTS), range(2, 5)], ids=["all experts here", "expert parallelism"])
@pytest.mark.parametrize("kept", [0.0, 0.4, 1.0])
def test_kept_pairs_alone_are_computed(own: range, kept: float, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernels(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    w1 = torch.randn(len(own), 2 * INNER, HIDDEN, generator=generator)
    w2 = torch.randn(len(own), HIDDEN, INNER, generator=generator)
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K).indices.int()
    weights = torch.rand(TOKENS, TOP_K, generator=generator)
    keep = torch.rand(TOKENS, TOP_K, generator=generator) < kept
    map_ = torch.tensor([own.index(expert) if expert in own else -1 for expert in range(EXPERTS)], dtype=torch.int32)
    experts: Any = object.__new__(triton_moe.TritonExperts)
    experts.quant_config = experts._quant_config = FUSED_MOE_UNQUANTIZED_CONFIG
    experts.activation_config = SimpleNamespace(clamp_limit=None)
    experts.quantization_emulation, experts._lora_context = False, None
    experts.activation = lambda kind, output, rows: output.copy_(F.silu(rows[:, :INNER]) * rows[:, INNER:])
    extended = extended_map(None if len(own) == EXPERTS else map_, EXPERTS, x.device)
    output = torch.full_like(x, math.nan)
    skipping_apply(experts, EXPERTS, extended)(
        output=output, hidden_states=x, w1=w1, w2=w2, topk_weights=torch.where(keep, weights, 0),
        topk_ids=torch.where(keep, ids, EXPERTS), activation=MoEActivation.SILU, global_num_experts=EXPERTS, expert_map=None,
        a1q_scale=None, a2_scale=None, workspace13=torch.full((TOKENS * TOP_K * 2 * HIDDEN,), math.nan),
        workspace2=torch.full((TOKENS * TOP_K * 2 * HIDDEN,), math.nan), expert_tokens_meta=None,
        apply_router_weight_on_input=False,
    )  # fmt: skip
    wanted, per_expert = torch.zeros_like(x), dict.fromkeys(own, 0)
    for token, rank in keep.nonzero().tolist():
        if (expert := int(ids[token, rank])) in own:
            gate, up = (w1[own.index(expert)] @ x[token]).chunk(2)
            wanted[token] += weights[token, rank] * (w2[own.index(expert)] @ (F.silu(gate) * up))
            per_expert[expert] += 1
    torch.testing.assert_close(output, wanted, atol=1e-4, rtol=1e-4)  # sums in another order; a pair too few is of order 1
    assert kernels.blocks == [sum(-(-count // BLOCK) for count in per_expert.values())] * 2
