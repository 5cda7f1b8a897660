"""Every vision-language family of transformers that holds Mixture-of-Experts layers, one line each.

``WRAPPERS`` holds families whose text model may be any: popular ones, over families of ``text.py``.
"""

from typing import Any

import transformers

from tests.families.family import Family, family
from tests.families.pictures import (
    AUDIO,
    END,
    IMAGE,
    START,
    VIDEO,
    Inputs,
    folded,
    grouped,
    patches,
    placed,
    shaped,
    sized,
    whole,
    with_canvas,
)
from tests.families.text import CONVERTED

_SEEN: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": VIDEO}
_HEARD: dict[str, Any] = {"audio_token_id": AUDIO}
_ONE: dict[str, Any] = {"num_hidden_layers": 1}
_QWEN: dict[str, Any] = {"depth": 1, "spatial_merge_size": 2, "temporal_patch_size": 2}
_DEEP = {**_QWEN, "deepstack_visual_indexes": [0]}
_SAM: dict[str, Any] = {**_ONE, "global_attn_indexes": [0], "output_channels": 8, "downsample_channels": [8, 32]}
_TILES: dict[str, Any] = {**_ONE, "image_size": [16, 16], "patch_size": [4, 4]}
_GEMMA_TOWER: dict[str, Any] = {**_ONE, "pooling_kernel_size": 2, "position_embedding_size": 16}
_GEMMA: dict[str, Any] = {"global_head_dim": 16, "num_experts": 8, "top_k_experts": 3, "moe_intermediate_size": 16}
_INDEXER = {"n_heads": 2, "kv_heads": 1, "head_dim": 16, "budget": 8, "compress_ratio": 4}
_SLIDING = {
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 16),
    "head_dim": 24,
}


def _rope(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}}


THINKER: dict[str, Any] = {
    **_SEEN,
    **_HEARD,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "vision_config": _DEEP,
    "text_config": _rope(4, 2, 2),
}
"""Changes to the configuration of Qwen3-Omni's thinker."""


def _sees(name: str, inputs: Inputs, expected: str = "rewritten", **changes: Any) -> Family:
    return family(name, expected, auto=transformers.AutoModelForImageTextToText, inputs=inputs, **changes)


def _over(text: str, name: str, inputs: Inputs, **changes: Any) -> Family:
    changes["text_config"] = {"model_type": text, **changes.get("text_config", {})}
    return _sees(f"{name}-{text}", inputs, kind=name, image_token_id=IMAGE, **changes)


VISION: tuple[Family, ...] = (
    _sees(
        "aria",
        whole(16, 4),
        image_token_index=IMAGE,
        projector_patch_to_query_dict={16: 4},
        vision_config={**_ONE, "image_size": 16},
    ),
    _sees(
        "deepseek_ocr2",
        whole(16, 145),
        image_token_id=IMAGE,
        vision_config={"sam_config": {**_SAM, "image_size": 16}, "encoder_config": _ONE},
        text_config={"mlp_layer_types": ["dense", "sparse", "sparse"], "num_experts_per_tok": 3},
    ),
    _sees("diffusion_gemma", with_canvas, image_token_id=IMAGE, vision_config=_GEMMA_TOWER, text_config=_GEMMA),
    _sees(
        "dots3_note",
        patches(48),
        **_SEEN,
        **_HEARD,
        vision_config={"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"]},
        text_config={f"swa_{name}": value for name, value in _SLIDING.items()},
    ),
    _sees(
        "ernie4_5_vl_moe",
        grouped,
        **_SEEN,
        vision_config={"depth": 1},
        text_config={"moe_intermediate_size": [16, 8], **_rope(2, 2, 4)},
    ),
    _sees(
        "gemma4",
        placed,
        **_SEEN,
        **_HEARD,
        vision_config={"model_type": "gemma4_vision", **_GEMMA_TOWER},
        text_config={**_GEMMA, "enable_moe_block": True},
    ),
    _sees("glm4v_moe", patches(96, types=True), **_SEEN, vision_config={**_QWEN, "image_size": 16}, text_config=_rope(2, 1, 1)),
    _sees(
        "glm5_next",
        patches(96, types=True),
        **_SEEN,
        vision_config={**_QWEN, "image_size": 16},
        text_config={"qk_rope_head_dim": 0},
    ),
    _sees("inkling", folded, kind="inkling_mm_model", image_token_id=IMAGE, **_HEARD, vision_config=_ONE),
    _sees("inkling2", patches(8, 8, 3, grid=(1, 2, 2)), image_token_id=IMAGE, vision_config=_ONE),
    _sees("kimi_k25", patches(3, 4, 4), **_SEEN, projection_hidden_size=32, vision_config=_ONE),
    _sees(
        "llama4",
        whole(16, 4),
        CONVERTED,
        image_token_index=IMAGE,
        text_config={"num_experts_per_tok": 1},
        vision_config={**_ONE, "image_size": 16, "intermediate_size": 128},
    ),
    _sees("minimax_m3_vl", patches(96), image_token_index=IMAGE, video_token_index=VIDEO, vision_config=_ONE),
    _sees("mistral_large4", sized, image_token_index=IMAGE, vision_config=_ONE),
    _sees(
        "muse_spark",
        patches(96),
        **_SEEN,
        **_HEARD,
        out_hidden_size=128,
        vision_config=_ONE,
        audio_config={"patch_sizes": (4, 2), "hidden_sizes": (8, 8), "depths": (1, 1), "num_hidden_layers": 2},
    ),
    _sees(
        "nemotron_h_omni",
        patches(48, grid=(4, 4), named="image_grid_hw"),
        image_token_id=IMAGE,
        vision_hidden_size=32,
        vision_config={**_ONE, "video_temporal_patch_size": 2, "image_size": 16, "max_img_size": 16},
    ),
    _sees("qwen3_5_moe", patches(96, types=True), **_SEEN, vision_config=_QWEN, text_config=_rope(1, 1, 0)),
    _sees("qwen3_omni_moe", patches(96), kind="qwen3_omni_moe_thinker", **THINKER),
    _sees("qwen3_vl_moe", patches(96, types=True), **_SEEN, vision_config=_DEEP, text_config=_rope(4, 2, 2)),
    _sees(
        "qwen4_exp",
        patches(96, types=True),
        **_SEEN,
        vision_config=_QWEN,
        text_config={**{f"indexer_{name}": value for name, value in _INDEXER.items()}, **_rope(1, 1, 0)},
    ),
    _sees("step3p7", whole(32, 4), CONVERTED, image_token_id=IMAGE, text_config={"sliding_window": 128}),
    _sees(
        "unlimited_ocr",
        whole(32, 7),
        image_token_id=IMAGE,
        vision_config={"sam_config": {**_SAM, "image_size": 32}, "encoder_config": {**_ONE, "image_size": 8}},
    ),
)

WRAPPERS: tuple[Family, ...] = (
    _over("cohere2_moe", "aya_vision", whole(16, 4), vision_config={**_ONE, "image_size": 16}),
    _over("qwen3_vl_moe_text", "cosmos3_omni", patches(96, types=True), text_config=_rope(4, 2, 2), vision_config=_DEEP),
    _over("gpt_oss", "internvl", whole(16, 4), vision_config=_TILES),
    _over("qwen3_moe", "internvl", whole(16, 4), vision_config=_TILES),
    _over("lfm2_moe", "lfm2_vl", shaped, text_config={"layer_types": ["conv", "full_attention", "conv"]}, vision_config=_ONE),
    _over("mixtral", "llava", whole(16, 16), vision_config={**_ONE, "image_size": 16}),
    _over("mistral4", "mistral3", sized, vision_config=_ONE),
    _over("qwen3_moe", "qianfan_ocr", whole(16, 4), vision_config=_TILES),
)
