"""Tiny random models of text families, of sizes that vLLM's CPU kernels take, on disk as vLLM reads them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models
from torch import Tensor, nn

from modes_fx.plan import PlanPoint, SkipPlan

VOCABULARY = 64
END = 1

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": END,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 4}
_LATENT = {"q_lora_rank": None, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}
"""The one size of latent attention that vLLM's CPU kernels take."""

FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "qwen3_moe": (
        transformers.Qwen3MoeForCausalLM,
        transformers.Qwen3MoeConfig,
        {**_EXPERTS, "head_dim": 32, "norm_topk_prob": True},
    ),
    "olmoe": (transformers.OlmoeForCausalLM, transformers.OlmoeConfig, {"num_experts": 8, "num_experts_per_tok": 4}),
    "mixtral": (
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt_oss": (
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig,
        {
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 128,
            "layer_types": ["full_attention"] * 2,
            "max_position_embeddings": 8192,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 2.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
    ),
    "deepseek_v3": (
        transformers.DeepseekV3ForCausalLM,
        transformers.DeepseekV3Config,
        {
            **_LATENT,
            "num_hidden_layers": 3,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 3,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
        },
    ),
    "dense": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {}),
}


PLAN = SkipPlan(
    points=(PlanPoint(0.0, 0.0, 0.0), PlanPoint(0.5, 0.11, 0.0)),
    alpha=((0.5, 0.5), (0.6, 0.5)),
    layers=("model.layers.0.mlp.experts", "model.layers.1.mlp.experts"),
)
"""Of ``qwen3_moe``: other thresholds in each layer, for text."""


def prompts(count: int, length: int) -> Tensor:
    """Return random tokens, [count, length]."""
    return torch.randint(2, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


def logprobs(llm: Any, prompts: Tensor) -> Tensor:
    """Return the log-probabilities of eight tokens that follow each prompt, [count, 8]."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=8, temperature=0, logprobs=0, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": row} for row in prompts.tolist()], sampling, use_tqdm=False)
    return torch.tensor([[next(iter(step.values())).logprob for step in each.outputs[0].logprobs] for each in outputs])


def make(family: str) -> nn.Module:
    """Return a random model whose routed outputs matter."""
    model_class, config_class, changes = FAMILIES[family]
    torch.manual_seed(sum(map(ord, family)))
    model = model_class(config_class(**{**_COMMON, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=1.0 if "gate.weight" in name or "router" in name else 0.15)
    return model


def save(family: str, folder: Path) -> Path:
    """Write such a model and a tokenizer whose words are numbers; return where."""
    path = folder / family
    make(family).save_pretrained(path)
    words = Tokenizer(models.WordLevel({str(index): index for index in range(VOCABULARY)}, unk_token="2"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="2", eos_token="1").save_pretrained(path)
    return path
