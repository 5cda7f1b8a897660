"""Tiny random checkpoints with processors, in folders as the hub's: ``python -m tests.checkpoints NAME FOLDER``.

FOLDER gets the checkpoint, and ``questions.jsonl`` with the embedded model's own questions to calibrate on.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CLIPImageProcessorPil, GotOcr2ImageProcessorPil, LlavaProcessor

from modes_fx.demo import make_samples
from modes_fx.models.images_processor import InternVLImagesProcessor
from tests.data import families
from tests.families.family import spread
from tests.families.shrink import tiny_config

SIZE = {"height": 16, "width": 16}


def internvl() -> tuple[nn.Module, Any]:
    """The class of InternVL-3.5-30B-A3B: its tower over Qwen3-MoE."""
    special = {
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "start": "<|im_start|>", "start_image_token": "<img>",
        "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
    }  # fmt: skip
    tokenizer = families.tokenizer("bytes", families.INTERNVL, special)
    images = GotOcr2ImageProcessorPil(size=SIZE, crop_to_patches=False)
    processor = InternVLImagesProcessor(images, tokenizer, image_seq_length=4, chat_template=families.INTERNVL)
    vision = {"num_hidden_layers": 1, "image_size": [16, 16], "patch_size": [4, 4]}
    text = {"model_type": "qwen3_moe", "vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    config = tiny_config(
        "internvl", image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), vision_config=vision, text_config=text
    )
    return transformers.InternVLForConditionalGeneration(config), processor


def kimi_vl() -> tuple[nn.Module, Any]:
    """DeepSeek-V3's router and shared experts under LLaVA's tower.

    Kimi-VL's own class comes with its weights; its language model is of this kind, but for the list that holds its experts.
    """
    special = {"eos_token": "</s>", "pad_token": "<pad>", "image_token": "<image>"}
    tokenizer = families.tokenizer("bytes", families.LLAVA, special)
    images = CLIPImageProcessorPil(size=SIZE, do_center_crop=False)
    processor = LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="full", num_additional_image_tokens=1,
        chat_template=families.LLAVA,
    )  # fmt: skip
    text = {"model_type": "deepseek_v3", "vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    config = tiny_config(
        "llava", image_token_id=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_select_strategy="full",
        vision_config={"num_hidden_layers": 1, "image_size": 16, "model_type": "clip_vision_model"}, text_config=text,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config), processor


BUILDERS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {"internvl-3.5-30b": internvl, "kimi-vl-a3b": kimi_vl}


def save(name: str, folder: Path) -> Path:
    """Write a checkpoint; the same weights for the same name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = BUILDERS[name]()
        spread(model).to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    lines = []
    for index, sample in enumerate(make_samples("calibration", n_images=2)):
        sample.image.save(folder / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "question": sample.question, "answer": sample.answer}))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


if __name__ == "__main__":
    save(sys.argv[1], Path(sys.argv[2]))
