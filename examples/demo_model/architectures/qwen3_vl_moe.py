"""The embedded model's: Qwen3-VL-MoE. A softmax over all experts, the largest eight, renormalised."""

from collections.abc import Mapping

from demo_model.architectures.architecture import (
    START,
    Architecture,
    build_tokenizer,
    chat_template,
    generation_config,
    start_as_lookup,
)
from demo_model.experts import BLOCKED
from demo_model.hub_form import qwen_to_hub_form
from demo_model.jobs.job import Job
from torch import Tensor, nn
from transformers import Qwen2VLImageProcessorPil, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from modes_fx.demo.canvas import SIDE
from modes_fx.models.images_processor import Qwen3VLImagesProcessor

PATCH, MERGE, TEMPORAL = 4, 2, 2  # 64x64 pixels: 16x16 patches, merged to 64 visual tokens
VISION_START, VISION_END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"


def _build_processor(job: Job) -> Qwen3VLImagesProcessor:
    """The family's own, with an image processor that keeps 64x64 as it is."""
    special = (VISION_START, VISION_END, IMAGE, VIDEO)
    tokenizer = build_tokenizer(job, special, additional_special_tokens=[START, *special])
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        temporal_patch_size=TEMPORAL,
        merge_size=MERGE,
        size={"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return Qwen3VLImagesProcessor(images, tokenizer, chat_template=chat_template(job, VISION_START + IMAGE + VISION_END))


def _build_model(processor: Qwen3VLImagesProcessor, job: Job) -> Qwen3VLMoeForConditionalGeneration:
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
        start_as_lookup(layer.self_attn)
    model.generation_config = generation_config(tokenizer, job)
    return model


def _visual_tokens(model: Qwen3VLMoeForConditionalGeneration, images: Mapping[str, Tensor]) -> Tensor:
    features_TH: Tensor = model.model.visual(images["pixel_values"], images["image_grid_thw"]).pooler_output
    return features_TH


def _tower(model: Qwen3VLMoeForConditionalGeneration) -> dict[str, nn.Module]:
    return {"visual": model.model.visual}


ARCHITECTURE = Architecture(
    name="qwen3_vl_moe",
    build_processor=_build_processor,
    build_model=_build_model,
    tower=_tower,
    visual_tokens=_visual_tokens,
    vision_steps=600,
    experts_implementation=BLOCKED,
    attention_implementation="sdpa",
    to_hub_form=qwen_to_hub_form,
)
