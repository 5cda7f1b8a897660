"""What the demo model is: its configuration, tokenizer, chat template and processor."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from modes_fx.demo.canvas import SIDE
from modes_fx.demo.questions import WORDS
from modes_fx.models.images_processor import Qwen3VLImagesProcessor

PATCH, MERGE, TEMPORAL = 4, 2, 2  # 64x64 pixels: 16x16 patches, merged to 64 visual tokens
PAD, START, END, UNKNOWN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unknown|>"
VISION_START, VISION_END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
SPECIAL = (PAD, START, END, UNKNOWN, VISION_START, VISION_END, IMAGE, VIDEO)

# Qwen's, without tools and system prompts.
CHAT_TEMPLATE = """{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


def build_processor() -> Qwen3VLImagesProcessor:
    """A word-level tokenizer (white space costs no token) and an image processor that keeps 64x64 as it is."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, "user", "assistant", *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[START, VISION_START, VISION_END, IMAGE, VIDEO],
        padding_side="left",
        model_max_length=1024,
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        temporal_patch_size=TEMPORAL,
        merge_size=MERGE,
        size={"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return Qwen3VLImagesProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE)


def build_model(processor: Qwen3VLImagesProcessor) -> Qwen3VLMoeForConditionalGeneration:
    """The untrained model in float32: eight layers of 32 experts, of which a token uses eight."""
    tokenizer = processor.tokenizer
    hidden = 128
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 256,  # no layer is dense; this only keeps the config honest about its scale
        "moe_intermediate_size": 32,
        "num_experts": 32,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 1024,
        "initializer_range": 0.05,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "out_hidden_size": hidden,
        "num_position_embeddings": (SIDE // PATCH) ** 2,
        "deepstack_visual_indexes": [0],
        "initializer_range": 0.05,
    }
    config = Qwen3VLMoeConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=processor.vision_start_token_id,
        vision_end_token_id=processor.vision_end_token_id,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen3VLMoeForConditionalGeneration(config)
    for layer in model.model.language_model.layers:
        _start_as_lookup(layer.self_attn)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=16,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


@torch.no_grad()
def _start_as_lookup(attention: nn.Module) -> None:
    """Let attention start as a look-up: alike tokens attend to each other, and copy what they find.

    Queries equal keys and outputs transpose values, as they come to be in trained models (Trockman and Kolter, Mimetic
    Initialization of Self-Attention Layers, 2023). From a random start, finding the cell that a question names took
    hundreds of steps before anything else was learned.
    """
    groups = attention.num_key_value_groups
    for projection in (attention.k_proj, attention.v_proj):
        nn.init.orthogonal_(projection.weight)

    def per_query_head(weight: torch.Tensor) -> torch.Tensor:
        return weight.unflatten(0, (-1, attention.head_dim)).repeat_interleave(groups, dim=0).flatten(0, 1)

    attention.q_proj.weight.copy_(per_query_head(attention.k_proj.weight))
    attention.o_proj.weight.copy_(per_query_head(attention.v_proj.weight).T / groups)
