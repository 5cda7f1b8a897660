"""InternVL's tower and processor, which transformers puts in front of any language model."""

from collections.abc import Mapping
from typing import Any

import torch
from demo_model.architectures.architecture import START, build_tokenizer, chat_template, generation_config
from demo_model.jobs.job import Job
from torch import Tensor, nn
from transformers import GotOcr2ImageProcessorPil, InternVLConfig, InternVLForConditionalGeneration

from modes_fx.demo.canvas import SIDE
from modes_fx.models.images_processor import InternVLImagesProcessor

PATCH, DOWNSAMPLE = 8, 1.0  # 64x64 pixels: 8x8 patches, each a visual token
VISUAL_TOKENS = int((SIDE // PATCH * DOWNSAMPLE) ** 2)
IMAGE_START, IMAGE_END, CONTEXT, VIDEO = "<img>", "</img>", "<IMG_CONTEXT>", "<video>"
HIDDEN = 128


def build_processor(job: Job) -> InternVLImagesProcessor:
    """The family's own; an image is one tile, kept at 64x64."""
    tokenizer = build_tokenizer(
        job,
        (IMAGE_START, IMAGE_END, CONTEXT, VIDEO),
        extra_special_tokens={
            "start_token": START,
            "start_image_token": IMAGE_START,
            "end_image_token": IMAGE_END,
            "context_image_token": CONTEXT,
            "video_token": VIDEO,
        },
    )
    images = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    template = chat_template(job, CONTEXT)
    return InternVLImagesProcessor(images, tokenizer, image_seq_length=VISUAL_TOKENS, chat_template=template)


def build_model(processor: InternVLImagesProcessor, job: Job, text: Mapping[str, Any]) -> InternVLForConditionalGeneration:
    """The untrained model in float32 over the language model that `text` configures, but for its vocabulary."""
    tokenizer = processor.tokenizer
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = {
        "num_hidden_layers": 2,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "image_size": [SIDE, SIDE],
        "patch_size": [PATCH, PATCH],
        "initializer_range": 0.05,
        "layer_scale_init_value": 1.0,  # 0.1 is for 24 layers
    }
    shared = {
        "vocab_size": len(tokenizer), "hidden_size": HIDDEN, "max_position_embeddings": 1024, "initializer_range": 0.05,
        "tie_word_embeddings": False,
    }  # fmt: skip
    config = InternVLConfig(
        vision_config=vision,
        text_config={**shared, **ids, **text},
        image_token_id=processor.image_token_id,
        image_seq_length=VISUAL_TOKENS,
        downsample_ratio=DOWNSAMPLE,
        tie_word_embeddings=False,
        **ids,
    )
    model = InternVLForConditionalGeneration(config)
    _start_near_by(model.model.vision_tower)
    model.generation_config = generation_config(tokenizer, job)
    return model


@torch.no_grad()
def _start_near_by(vision: nn.Module) -> None:
    """Let patches start out attending to those near by: positions are waves, and queries equal keys.

    Waves as in Vaswani et al., Attention Is All You Need, 2017, half of them of the row and half of the column; queries as
    language models' in `start_as_lookup`. transformers starts positions as zeros, where all patches are alike.
    """
    positions_1NH = vision.embeddings.position_embeddings  # the first is the class token's
    side, waves = SIDE // PATCH, positions_1NH.shape[-1] // 4
    angles_GW = torch.arange(side).unsqueeze(1) * 100.0 ** (-torch.arange(waves) / waves)
    line_GD = torch.cat((angles_GW.sin(), angles_GW.cos()), dim=1)
    rows_GGD, columns_GGD = line_GD.unsqueeze(1).expand(-1, side, -1), line_GD.expand(side, -1, -1)
    positions_1NH[:, 1:] = 0.5 * torch.cat((rows_GGD, columns_GGD), dim=-1).flatten(0, 1)
    for layer in vision.encoder.layer:
        nn.init.orthogonal_(layer.attention.k_proj.weight)
        layer.attention.q_proj.weight.copy_(layer.attention.k_proj.weight)


def visual_tokens(model: InternVLForConditionalGeneration, images: Mapping[str, Tensor]) -> Tensor:
    """The projected tokens of all images, float [T, H]."""
    tokens_BTH: Tensor = model.model.get_image_features(pixel_values=images["pixel_values"]).pooler_output
    return tokens_BTH.flatten(0, 1)


def tower(model: InternVLForConditionalGeneration) -> dict[str, nn.Module]:
    """What makes them."""
    return {"vision_tower": model.model.vision_tower, "multi_modal_projector": model.model.multi_modal_projector}
