"""From a name to a model and its processor."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from modes_fx.errors import ModelError
from modes_fx.models.locating import DEMO
from modes_fx.models.waiting import look_up

logger = logging.getLogger(__name__)


def check_torchvision() -> None:
    """Find out before anything depends on it whether an installed torchvision can be imported.

    Installing lmms-eval together with its dependencies brings a torchvision that fits another torch; transformers then fails on
    whatever it imports next, and names that instead.

    Raises:
        ModelError: It is installed and cannot be imported.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        raise ModelError(
            f"The installed torchvision does not fit torch {torch.__version__} and breaks transformers: {error}. Run "
            "`pip uninstall torchvision`, or install the release made for this torch."
        ) from error


def load(
    name: str,
    *,
    dtype: str = "auto",
    device_map: Any = None,
    processor: Any = None,
    trust_remote_code: bool = False,
    sees_images: bool = False,
    processor_settings: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Load a model, in eval mode, and its processor.

    Args:
        name: ``"demo"`` for the embedded model, a folder, or the id of a model on the Hugging Face hub.
        dtype: Of the weights, such as ``"bfloat16"``; ``"auto"`` takes the one they are stored in.
        device_map: As transformers takes it; None leaves the model on the CPU.
        processor: One to use instead of the model's own, or None.
        trust_remote_code: Whether Python code that comes with the model may run.
        sees_images: Refuse a model that has a tokenizer instead of a processor.
        processor_settings: For the processor, such as ``max_pixels``.

    Raises:
        ModelError: There is no such model, or it or its processor cannot be loaded whole.
    """
    if name == DEMO:
        from modes_fx.models import embedded

        if device_map is not None:
            raise ModelError(f"The embedded model goes to one device; it takes no device map, got {device_map!r}.")
        if processor_settings:
            raise ModelError(f"The embedded model's processor takes no settings, got {', '.join(processor_settings)}.")
        model, own = embedded.load(torch.bfloat16 if dtype == "auto" else _dtype(dtype))
        return model, own if processor is None else processor
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    model = _load_model(name, dtype, device_map, trust_remote_code)
    if processor is None:
        kind = _processor_class(model.config.model_type)
        processor = _load_processor(name, kind, trust_remote_code, sees_images, processor_settings or {})
    return model.eval(), processor


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ModelError(f'Unknown dtype {name!r}; pass "auto", or one of torch\'s, such as "bfloat16".')
    return dtype


def _load_model(name: str, dtype: str, device_map: Any, trust_remote_code: bool) -> Any:
    from modes_fx.models.meta_model import model_class, read_config

    config = read_config(name, trust_remote_code=trust_remote_code)
    kind = model_class(config, trust_remote_code=trust_remote_code)
    settings: dict[str, Any] = {"dtype": dtype if dtype == "auto" else _dtype(dtype)}
    if device_map is not None:
        settings["device_map"] = device_map
    if trust_remote_code:
        settings["trust_remote_code"] = True
    logger.info("loading the %s model %s", config.model_type, name)
    try:
        model, found = _maybe_looked_up(
            name, "the weights", lambda: kind.from_pretrained(name, output_loading_info=True, **settings)
        )
    except Exception as error:  # a damaged file or a model's own code may raise anything
        raise ModelError(f"Cannot load the {config.model_type} model {name}: {error}") from error
    if found["missing_keys"]:  # transformers would go on with random numbers, whose score means nothing
        missing = sorted(found["missing_keys"])
        raise ModelError(
            f"{name} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}. Does its config.json "
            "belong to these weights?"
        )
    return model


def _processor_class(model_type: str) -> Any:
    """Return what loads a processor: one without its video processor, where there is no torchvision for that."""
    from transformers import AutoProcessor

    from modes_fx.models.images_processor import InternVLImagesProcessor, Qwen3VLImagesProcessor

    images_alone = {
        "qwen3_vl": Qwen3VLImagesProcessor,
        "qwen3_vl_moe": Qwen3VLImagesProcessor,
        "internvl": InternVLImagesProcessor,
    }
    if model_type not in images_alone or importlib.util.find_spec("torchvision") is not None:
        return AutoProcessor
    logger.info("torchvision is not installed: the processor takes images, and no videos")
    return images_alone[model_type]


def _load_processor(name: str, kind: Any, trust_remote_code: bool, sees_images: bool, settings: Mapping[str, Any]) -> Any:
    from transformers import PreTrainedTokenizerBase

    try:
        processor = _maybe_looked_up(
            name,
            "the processor",
            lambda: kind.from_pretrained(name, trust_remote_code=trust_remote_code, **settings),
        )
    except Exception as error:  # see above
        hint = ""
        if importlib.util.find_spec("torchvision") is None:
            hint = f" torchvision is not installed: many processors need the release that fits torch {torch.__version__}."
        raise ModelError(f"Cannot load the processor of {name}: {error}{hint}") from error
    if sees_images and isinstance(processor, PreTrainedTokenizerBase):
        raise ModelError(f"{name} has a tokenizer and no processor: it is not a vision-language model.")
    return processor


def _maybe_looked_up(name: str, what: str, read: Callable[[], Any]) -> Any:
    """Return what is here, or is downloaded from the hub, however large."""
    return read() if Path(name).exists() else look_up(f"{what} of {name}", read, ends=False)
