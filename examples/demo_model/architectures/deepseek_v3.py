"""DeepSeek-V3's language model, Kimi-VL's and GLM-4.5V's kind of router, behind InternVL's tower.

Scores are sigmoids; a bias that balances the load (and takes no part in the weights) corrects the choice of two of four groups,
then of six experts in them; weights are renormalised and scaled; a shared expert runs for every token, and the first layer is
dense. Attention compresses keys and values (multi-head latent attention).
"""

import torch
from demo_model.architectures import internvl
from demo_model.architectures.architecture import Architecture
from demo_model.experts import BLOCKED
from demo_model.hub_form import internvl_to_hub_form
from demo_model.jobs.job import Job
from torch import nn
from transformers import InternVLForConditionalGeneration

from modes_fx.models.images_processor import InternVLImagesProcessor

_TEXT = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 8,
    "first_k_dense_replace": 1,
    "intermediate_size": 256,
    "moe_intermediate_size": 32,
    "n_routed_experts": 32,
    "num_experts_per_tok": 6,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,  # with those that are rotated as many as the values', as flash attention wants on a CPU
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}


def _build_model(processor: InternVLImagesProcessor, job: Job) -> InternVLForConditionalGeneration:
    model = internvl.build_model(processor, job, _TEXT)
    for layer in model.model.language_model.layers:
        _start_as_lookup(layer.self_attn)
    return model


@torch.no_grad()
def _start_as_lookup(attention: nn.Module) -> None:
    """As the others start, through the compressed keys and values: see `architecture.start_as_lookup`."""
    heads, nope, value = attention.num_heads, attention.qk_nope_head_dim, attention.v_head_dim
    down_RH = nn.init.orthogonal_(attention.kv_a_proj_with_mqa.weight.new_empty(attention.kv_lora_rank, attention.hidden_size))
    attention.kv_a_proj_with_mqa.weight[: attention.kv_lora_rank].copy_(down_RH)
    up_NKR = attention.kv_b_proj.weight.unflatten(0, (heads, nope + value))
    query_NQH = attention.q_proj.weight.unflatten(0, (heads, attention.qk_head_dim))
    output_HNV = attention.o_proj.weight.unflatten(1, (heads, value))
    for head in range(heads):
        for part in (up_NKR[head, :nope], up_NKR[head, nope:]):
            nn.init.orthogonal_(part)
        query_NQH[head, :nope].copy_(up_NKR[head, :nope] @ down_RH)
        output_HNV[:, head].copy_((up_NKR[head, nope:] @ down_RH).T)


ARCHITECTURE = Architecture(
    name="deepseek_v3",
    build_processor=internvl.build_processor,
    build_model=_build_model,
    tower=internvl.tower,
    visual_tokens=internvl.visual_tokens,
    vision_steps=1000,
    steps={"grid": 1000, "pairs": 3000},  # it may take 1,800 of them until it can look up codes at all
    experts_implementation=BLOCKED,
    attention_implementation="sdpa",
    to_hub_form=internvl_to_hub_form,
)
