"""Shapes of well-known models' language models, as configs of transformers; each layer as published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modes_fx.errors import ModesFxError

_VOCABULARY = 64  # layers are given embeddings, so that no table of them is needed


def config_of(name: str, layers: int) -> Any:
    """Return the config of a preset with so many decoder layers, each of them with experts.

    Raises:
        ModesFxError: There is no such preset.
    """
    import transformers  # not before options were looked at: it takes seconds

    check_preset(name)
    kind, fields = PRESETS[name]
    return getattr(transformers, kind)(**fields, num_hidden_layers=layers, vocab_size=_VOCABULARY, pad_token_id=None)


def check_preset(name: str) -> None:
    """See that there is a preset of that name.

    Raises:
        ModesFxError: There is none.
    """
    if name not in PRESETS:
        raise ModesFxError(f"Unknown preset {name!r}; known: {', '.join(PRESETS)}.")


def _mrope(theta: float, sections: list[int]) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": sections}}


PRESETS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen3-vl-30b-a3b": ("Qwen3VLMoeTextConfig", {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "max_position_embeddings": 262144, **_mrope(5e6, [24, 20, 20]),
    }),
    # Its language model is Moonlight-16B-A3B, of DeepSeek-V3's form; its one layer without experts is left out.
    "kimi-vl-a3b": ("DeepseekV3Config", {
        "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408, "n_routed_experts": 64,
        "num_experts_per_tok": 6, "n_shared_experts": 2, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
        "routed_scaling_factor": 2.446, "first_k_dense_replace": 0, "num_attention_heads": 16, "num_key_value_heads": 16,
        "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "max_position_embeddings": 131072,
    }),
    # Its language model is Qwen3-30B-A3B.
    "internvl-3.5-30b": ("Qwen3MoeConfig", {
        "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 40960,
        "norm_topk_prob": True, "head_dim": 128,
    }),
    "gpt-oss-20b": ("GptOssConfig", {
        "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    }),
    "olmoe-1b-7b": ("OlmoeConfig", {
        "hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8,
        "num_attention_heads": 16, "num_key_value_heads": 16,
    }),
    # Of no model: to see in seconds that all runs.
    "tiny": ("Qwen3VLMoeTextConfig", {
        "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
        **_mrope(1e4, [4, 2, 2]),
    }),
}  # fmt: skip
