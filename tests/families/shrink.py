"""Make a tiny configuration of any model: what sets its size gets a tiny value, everything else keeps its default."""

from dataclasses import fields
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

LAYERS, VOCABULARY = 3, 64

_DEPTHS = ["num_hidden_layers", "num_layers", "n_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "depth"]
_NAMES = {
    VOCABULARY: "vocab_size unpadded_vocab_size vocab_size_per_layer_input",
    32: """hidden_size d_model moe_hidden_size out_hidden_size output_dim text_hidden_size projection_hidden_dim
        projector_hidden_size projector_input_dim projector_output_dim vision_output_dim router_hidden_size
        adapter_in_dim adapter_out_dim adapter_input_size index_topk keep_window_size""",
    16: """intermediate_size moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size
        shared_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size ffn_hidden_size d_ff encoder_ffn_dim
        decoder_ffn_dim intermediate_size_mlp dense_intermediate_size share_expert_dim mlp_dim projection_intermediate_size
        q_lora_rank kv_lora_rank o_lora_rank head_dim swa_head_dim v_head_dim d_kv kv_channels linear_head_dim
        linear_key_head_dim linear_value_head_dim index_head_dim mamba_head_dim mamba_d_head
        hidden_size_per_layer_input num_position_embeddings chunk_size mamba_chunk_size block_size""",
    8: """qk_nope_head_dim qk_rope_head_dim num_experts num_local_experts n_routed_experts moe_num_experts
        mamba_d_state ssm_state_size rotary_dim d_rel gated_norm_rank hc_lowrank""",
    3: "num_experts_per_tok moe_topk moe_top_k moe_k",
    2: """num_attention_heads num_key_value_heads n_heads num_heads kv_n_heads swa_num_attention_heads
        swa_num_key_value_heads num_sliding_attention_heads encoder_attention_heads decoder_attention_heads
        linear_num_heads linear_num_key_heads linear_num_value_heads
        index_n_heads n_group hc_mult hc_count zero_expert_num o_groups heads_per_ngram mamba_dt_rank
        hc_sinkhorn_iters layer_group_size""",
    1: """topk_group n_groups mamba_n_groups n_shared_experts num_shared_experts moe_num_shared_experts num_dense_layers
        first_k_dense_replace encoder_sparse_step decoder_sparse_step num_sparse_encoder_layers
        num_sparse_decoder_layers bos_token_id""",
    4: "mamba_num_heads mamba_n_heads patch_size",
    128: "max_position_embeddings max_seq_len sliding_window sliding_window_size attention_chunk_size",
    0: "pad_token_id num_nextn_predict_layers",
}
_SIZES = {name: size for size, names in _NAMES.items() for name in names.split()} | dict.fromkeys(_DEPTHS, LAYERS)


def tiny_config(kind: str | type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """Return a tiny configuration.

    Attributes that are None by default, or that the class does not declare, are left alone. Of a list with one entry a layer
    one entry of each kind stays, in order, the last as often as layers remain. Nested configurations are shrunk too.

    Args:
        kind: A model type or a configuration class.
        changes: Attributes with values of the caller's; for a nested configuration a dict of its own changes, where
            ``model_type`` puts another kind in the place of the default one.
    """
    config_class = CONFIG_MAPPING[kind] if isinstance(kind, str) else kind
    default = config_class()
    default.allow_global_per_layer_attribute_access = True  # configurations whose layers differ refuse the look otherwise
    nested = {}
    for name in config_class.sub_configs:
        if isinstance(part := getattr(default, name, None), PreTrainedConfig) or name in changes:
            own = dict(changes.pop(name, {}))
            nested[name] = tiny_config(own.pop("model_type", type(part)), **own)
    declared = {item.name: getattr(default, item.name, None) for item in fields(config_class) if item.name not in nested}
    tiny = {name: _SIZES[name] for name, value in declared.items() if name in _SIZES and value is not None}
    if "eos_token_id" in declared:
        tiny["eos_token_id"] = None
    layers = next((changes.get(name, LAYERS) for name in _DEPTHS if name in declared), LAYERS)
    depth = next((declared[name] for name in _DEPTHS if declared.get(name)), None)
    for name, value in declared.items():
        if name not in tiny and isinstance(value, list) and len(value) in (depth, getattr(default, "num_hidden_layers", depth)):
            tiny[name] = _one_of_each(value, layers)
    return config_class(**{**tiny, **nested, **changes})


def _one_of_each(per_layer: list[Any], layers: int) -> list[Any]:
    if per_layer == list(range(len(per_layer))):
        return list(range(layers))
    kinds = list(dict.fromkeys(per_layer))[:layers]
    return kinds + kinds[-1:] * (layers - len(kinds))
