"""Tiny random models of real families, and batches for them; every model comes from transformers' own classes."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 64
IMAGE, VISION_START, VISION_END = 60, 61, 62
PAD = 0

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_ROPE_3D = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}


def qwen3_vl_moe(**changes: Any) -> nn.Module:
    """The main job's family: a vision tower, then softmax, top-k and renormalised weights."""
    text = {
        **_COMMON,
        "head_dim": 16,
        "moe_intermediate_size": 16,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "rope_parameters": _ROPE_3D,
        **changes,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    config = transformers.Qwen3VLMoeConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=63,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def glm4v_moe(**changes: Any) -> nn.Module:
    """A vision-language model with sigmoid gating, groups and shared experts."""
    text = {
        **_COMMON,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 0,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "rope_parameters": {**_ROPE_3D, "mrope_section": [2, 1, 1]},
        "head_dim": 16,
        **changes,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "image_size": 16,
    }
    config = transformers.Glm4vMoeConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=63,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
    )
    return transformers.Glm4vMoeForConditionalGeneration(config)


def qwen3_moe(**changes: Any) -> nn.Module:
    """Softmax, top-k, not renormalised."""
    return transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **{**_COMMON, "head_dim": 16, "moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 3, **changes}
        )
    )


def qwen2_moe(**changes: Any) -> nn.Module:
    """With a gated shared expert."""
    return transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **{
                **_COMMON,
                "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 16,
                "num_experts": 6,
                "num_experts_per_tok": 3,
                **changes,
            }
        )
    )


def mixtral(**changes: Any) -> nn.Module:
    """Two experts a token."""
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**{**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, **changes})
    )


def olmoe(**changes: Any) -> nn.Module:
    """Softmax, top-k, not renormalised; an MoE block in every layer."""
    return transformers.OlmoeForCausalLM(
        transformers.OlmoeConfig(**{**_COMMON, "num_experts": 6, "num_experts_per_tok": 3, **changes})
    )


def deepseek_v3(**changes: Any) -> nn.Module:
    """Sigmoid gating with a bias, top-k within groups, shared experts, a first layer without MoE."""
    return transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(
            **{
                **_COMMON,
                "num_hidden_layers": 3,
                "moe_intermediate_size": 16,
                "n_routed_experts": 8,
                "n_group": 2,
                "topk_group": 1,
                "num_experts_per_tok": 3,
                "n_shared_experts": 1,
                "first_k_dense_replace": 1,
                "q_lora_rank": 16,
                "kv_lora_rank": 16,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8,
                "v_head_dim": 16,
                **changes,
            }
        )
    )


def gpt_oss(**changes: Any) -> nn.Module:
    """Transposed weights, gate and up interleaved, a bias for each expert."""
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            **{
                **_COMMON,
                "head_dim": 16,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "sliding_window": 128,
                "layer_types": ["full_attention"] * 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
                **changes,
            }
        )
    )


def dense() -> nn.Module:
    """A model without any MoE layer."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_COMMON))


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    builder.__name__: builder
    for builder in (qwen3_vl_moe, glm4v_moe, qwen3_moe, qwen2_moe, mixtral, olmoe, deepseek_v3, gpt_oss)
}


@cache
def _prototype(family: str, layers: int | None = None) -> nn.Module:
    torch.manual_seed(sum(map(ord, family)))
    changes: dict[str, Any] = {} if layers is None else {"num_hidden_layers": layers}
    if layers is not None and family == "gpt_oss":
        changes["layer_types"] = ["full_attention"] * layers
    if layers is not None and family == "deepseek_v3":
        changes["first_k_dense_replace"] = 0
    model = FAMILIES[family](**changes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:  # the stock initialisation leaves tiny routed outputs that no test would miss
                parameter.normal_(std=1.0 if "gate.weight" in name or "router" in name else 0.3)
            elif "bias" in name:
                parameter.normal_(std=0.3)
    return model


def make(family: str = "qwen3_vl_moe", dtype: torch.dtype = torch.float32, layers: int | None = None) -> nn.Module:
    """Return a fresh model; the same weights for the same family. ``layers`` are MoE layers all; None: as many as it has."""
    return copy.deepcopy(_prototype(family, layers)).to(dtype)


def one_layer() -> nn.Module:
    """Return ``qwen3_moe`` with its first layer alone, where the code of two would show no more and take twice the time."""
    model = make("qwen3_moe")
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    return model


def image_row(before: int, images: int, after: int, generator: torch.Generator) -> list[int]:
    """Return token ids with ``images`` images of 4 tokens each."""
    text = torch.randint(2, IMAGE, (before + after,), generator=generator).tolist()
    picture = [VISION_START, *[IMAGE] * 4, VISION_END]
    return text[:before] + picture * images + text[before:]


def batch(rows: list[list[int]], *, side: str = "left", seed: int = 0) -> dict[str, Tensor]:
    """Pad rows of token ids to a batch for ``qwen3_vl_moe``; each image is 4 x 4 patches of noise."""
    length = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        fill = length - len(row)
        ids.append([PAD] * fill + row if side == "left" else row + [PAD] * fill)
        mask.append([0] * fill + [1] * len(row) if side == "left" else [1] * len(row) + [0] * fill)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    images = sum(row.count(VISION_START) for row in rows)
    if images:
        noise = torch.Generator().manual_seed(seed)
        inputs["pixel_values"] = torch.randn(images * 16, 3 * 2 * 4 * 4, generator=noise)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * images)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return inputs


def mixed_batch(*, side: str = "left", seed: int = 0) -> dict[str, Tensor]:
    """Return three sequences of different length: one image, two images, text only."""
    generator = torch.Generator().manual_seed(seed)
    rows = [image_row(2, 1, 4, generator), image_row(3, 2, 3, generator), image_row(3, 0, 5, generator)]
    return batch(rows, side=side, seed=seed)


def text_batch(rows: int = 2, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Return unpadded token ids for any family."""
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(2, IMAGE, (rows, length), generator=generator)}


def classes(inputs: dict[str, Tensor]) -> Tensor:
    """Return int64 [B, S]: 0 text, 1 vision, 2 padding; written without modes_fx."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    return torch.where(mask == 0, 2, (ids == IMAGE).long())
