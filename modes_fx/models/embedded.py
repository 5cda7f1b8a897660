"""The embedded model: loaded from what ships with the package, or another of its kind from a folder."""

import os
from pathlib import Path

import torch
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from modes_fx.errors import ModelError
from modes_fx.files.shipped import check_checkpoint
from modes_fx.models.images_processor import Qwen3VLImagesProcessor
from modes_fx.models.locating import CHECKPOINT
from modes_fx.models.meta_model import read_config


def load(
    dtype: torch.dtype = torch.bfloat16, *, folder: str | os.PathLike[str] | None = None
) -> tuple[Qwen3VLMoeForConditionalGeneration, Qwen3VLImagesProcessor]:
    """Load the embedded model, or another of its kind, and its processor.

    Args:
        dtype: of the weights; they are stored in bfloat16.
        folder: a folder that `examples/train_demo_model.py` wrote; none takes the embedded one.

    Returns:
        The model, in eval mode, on the CPU, and the processor.

    Raises:
        ModelError: if the folder is missing or does not hold such a model, or the embedded one is damaged.
    """
    if folder is None:
        check_checkpoint()
    path = CHECKPOINT if folder is None else Path(folder)
    if not (path / "config.json").is_file():
        raise ModelError(f"There is no model in {path}: it has no config.json. Pass a folder written by save_pretrained.")
    if (kind := read_config(path).model_type) != Qwen3VLMoeConfig.model_type:
        raise ModelError(
            f"{path} holds a model of type {kind!r}, and the demo's are Qwen3-VL-MoE. For others use `modes-fx calibrate` and "
            "`search`, or `compare`."
        )
    try:
        model = Qwen3VLMoeForConditionalGeneration.from_pretrained(path, dtype=dtype, local_files_only=True)
        processor = Qwen3VLImagesProcessor.from_pretrained(path, local_files_only=True)
    except Exception as error:  # a damaged file may raise anything
        raise ModelError(f"Cannot load a Qwen3-VL-MoE model and its processor from {path}: {error}") from error
    return model.eval(), processor
