"""Every language-model family of transformers that holds Mixture-of-Experts layers, one line each."""

import torch
import transformers
from torch import Tensor

from tests.families.family import Family, family, token_ids

CONVERTED = "converted"
"""A loop over experts, or dense products over all of them, which transformers' dispatch never sees."""


def two_sequences() -> dict[str, Tensor]:
    """Return inputs of an encoder-decoder."""
    ids = token_ids()["input_ids"]
    return {"input_ids": ids, "decoder_input_ids": torch.flip(ids[:, :6], (1,))}


def hash_routed(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    """Return a model whose layers that route by token id have a table of three different experts for each token."""
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):
            table.copy_(torch.rand(len(table), config.n_routed_experts).argsort(dim=1)[:, : table.shape[1]])
    return model


_TOKENS = transformers.AutoModelForTokenClassification
_SEQ2SEQ = transformers.AutoModelForSeq2SeqLM

TEXT: tuple[Family, ...] = (
    family("afmoe"),
    family("axk1"),
    family("axk2"),
    family("bailing_hybrid"),
    family("beam"),
    family("cohere2_moe"),
    family("dbrx", CONVERTED, d_model=32, attn_config={"rope_theta": 10000.0, "clip_qkv": 8.0}),
    family("deepseek_v2", num_experts_per_tok=3),
    family("deepseek_v3"),
    family("deepseek_v32"),
    family("deepseek_v4", auto=hash_routed),
    family("doge", "rejected:EXPERTS_ARE_EMBEDDINGS", is_moe=True),
    family("dots1", n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3, first_k_dense_replace=1),
    family("ernie4_5_moe"),
    family("exaone_moe"),
    family("flex_olmo"),
    family("flint"),
    family("glm4_moe"),
    family("glm4_moe_lite"),
    family("glm_moe_dsa"),
    family("gpt_oss"),
    family("granitemoe"),
    family("granitemoe_swa"),
    family("granitemoehybrid", layer_types=["linear_attention", "full_attention", "linear_attention"]),
    family("granitemoeshared"),
    family("hunyuan_v1_moe", head_dim=16),
    family("hy_v3"),
    family("hy_v4"),
    family("jamba", attn_layer_offset=0, attn_layer_period=2, expert_layer_period=1, expert_layer_offset=0),
    family("jetmoe", CONVERTED),
    family("kimi_linear"),
    family("kolibri1"),
    family("laguna", num_attention_heads_per_layer=[2, 2, 4]),
    family("lfm2_moe", layer_types=["conv", "full_attention", "conv"]),
    family("llama4", CONVERTED, kind="llama4_text", num_experts_per_tok=1),
    family("longcat_flash", CONVERTED, head_dim=8),
    family("mellum"),
    family("mimo_v2_flash", num_key_value_heads=1),
    family("minimax"),
    family("minimax_m2"),
    family("mistral4", auto=transformers.Mistral4ForCausalLM),
    family("mixtral"),
    family("nemotron_h", layers_block_type=["linear_attention", "moe", "full_attention", "moe"]),
    family(
        "nemotron3_5_transcribe",  # speech recognition; its encoder is dense
        kind="nemo_speechlm",
        auto=transformers.Nemotron3_5TranscribeForConditionalGeneration,
        audio_config={"diarization_config": {"head_config": {"audio_hidden_size": 32}}},
        word_timestamp_config={"blank_token_id": 0},
        text_config={"layers_block_type": ["linear_attention", "moe", "full_attention"]},
    ),
    family("nllb_moe", "rejected:CAPACITY", kind="nllb-moe", auto=_SEQ2SEQ, inputs=two_sequences),
    family("olmoe"),
    family("openai_privacy_filter", auto=_TOKENS),
    family("phimoe"),
    family("qwen2_moe"),
    family("qwen3_moe"),
    family("qwen3_next"),
    family("solar_open"),
    family("switch_transformers", "rejected:CAPACITY", auto=_SEQ2SEQ, inputs=two_sequences),
    family("zaya", num_experts_per_tok=1),
)
