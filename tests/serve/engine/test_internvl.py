"""InternVL as transformers has it, a tiny random model around Qwen3-MoE's layers: its images' tokens have their thresholds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
)
from vllm import SamplingParams

import modes_fx
from modes_fx.plan import SkipPlan
from tests import harness
from tests.data.families import INTERNVL, tokenizer
from tests.serve.engine.conftest import make_engine, pairs, ratios

SIDE, VISUAL = 32, 4  # pixels, tokens of an image
PROMPT = "<|im_start|>user\n<IMG_CONTEXT>\nIs it a dog?<|im_end|>\n<|im_start|>assistant\n"
TOKENS = {
    "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "start": "<|im_start|>", "start_image_token": "<img>",
    "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
}  # fmt: skip


def make_processor() -> InternVLProcessor:
    size = {"height": SIDE, "width": SIDE}
    return InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=False), tokenizer("bytes", INTERNVL, TOKENS),
        InternVLVideoProcessor(size=size), image_seq_length=VISUAL, chat_template=INTERNVL,
    )  # fmt: skip


def make_model(image_token: int) -> InternVLForConditionalGeneration:
    text = {
        "model_type": "qwen3_moe", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32,
        "num_experts": 8, "num_experts_per_tok": 4, "norm_topk_prob": True, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1,
        "image_size": [SIDE, SIDE], "patch_size": [8, 8],
    }  # fmt: skip
    config = InternVLConfig(
        text_config=text, vision_config=vision, image_token_id=image_token, image_seq_length=VISUAL, downsample_ratio=0.5,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=1.0 if "gate.weight" in name else 0.15)
    return model


def test_as_in_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = make_processor()
    model = make_model(processor.image_token_id)
    for each in (processor, model):
        each.save_pretrained(tmp_path)
    plan = SkipPlan.uniform(text=0.15, vision=0.25)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(8)]
    llm = make_engine(
        tmp_path, settings={"plan": str(plan.save(tmp_path / "plan.json"))}, dtype="float32",
        limit_mm_per_prompt={"image": 1, "video": 0},
    )  # fmt: skip
    outputs = llm.generate(
        [{"prompt": PROMPT, "multi_modal_data": {"image": image}} for image in images],
        SamplingParams(max_tokens=1, temperature=0, logprobs=0),
        use_tqdm=False,
    )
    found = torch.tensor([each.outputs[0].cumulative_logprob for each in outputs])
    assert pairs(llm)[4] == 8 * VISUAL * 2 * 4
    inputs = [processor(images=[image], text=[PROMPT], return_tensors="pt") for image in images]

    def best() -> torch.Tensor:
        return torch.stack([model(**each).logits[0, -1].log_softmax(-1).amax() for each in inputs])

    harness.compile_with(monkeypatch, harness.uncompiled)
    with torch.inference_mode():
        whole = best()
        with modes_fx.stats(modes_fx.optimize(model, plan)) as stats:
            wanted = best()
    for modality in ("text", "vision"):
        skipped = ratios([0] * 8, pairs(llm))[f"{modality} prefill"]
        assert 0.2 < skipped < 0.8
        assert skipped == pytest.approx(stats.skip_ratio(modality=modality), abs=0.01)
    assert (found - wanted).abs().max() < 1e-3 < (found - whole).abs().median()
