"""From the name of a model to the model without its weights: the modules and shapes are real, no memory is taken."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from modes_fx.errors import ModelError
from modes_fx.models.locating import locate
from modes_fx.models.waiting import look_up

logger = logging.getLogger(__name__)

T = TypeVar("T")

# In this order: a vision-language model is often listed among the language models too, for its language part alone.
_AUTO_CLASSES = ("AutoModelForMultimodalLM", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")


def read_config(source: str | os.PathLike[str], *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read a model's config.

    Args:
        source: A folder that holds a ``config.json``, such a file, or the id of a model on the Hugging Face hub.
        trust_remote_code: Whether Python code that comes with the model may run.

    Raises:
        ModelError: There is no such model, its config cannot be read, or the installed transformers does not know its kind.
    """
    where = locate(source)
    try:
        content, _ = _maybe_looked_up(where, lambda: PretrainedConfig.get_config_dict(where))
    except ModelError:
        raise
    except Exception as error:  # a file that is no object, or a deep one, is none of what transformers looks for
        hint = "" if os.path.exists(where) else _HUB_HINT
        raise ModelError(f"Cannot read the config of {where}: {_one_line(error)}{hint}") from error
    kind = content.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise ModelError(f"The config of {where} is not valid: its model_type is {kind!r}, expected text.")
    if "auto_map" in content and kind not in CONFIG_MAPPING and not trust_remote_code:
        raise ModelError(
            f"{where} has model_type {kind!r}, which transformers {transformers.__version__} does not know, and brings Python "
            "code of its own. If you trust that code, pass trust_remote_code=True (--trust-remote-code)."
        )
    if "auto_map" not in content and kind not in CONFIG_MAPPING:
        raise ModelError(
            f"{where} has model_type {kind!r}, which the installed transformers {transformers.__version__} does not know. "
            "Install a release that does. A model that brings Python code of its own names it under auto_map of config.json, "
            "and needs trust_remote_code=True (--trust-remote-code)."
        )
    try:
        config: PretrainedConfig = _maybe_looked_up(
            where, lambda: AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
        )
    except ModelError:
        raise
    except Exception as error:  # a config's own code, remote code too, may raise anything
        raise ModelError(f"The config of {where} (model_type {kind!r}) is not valid: {_one_line(error)}") from error
    return config


def _maybe_looked_up(where: str, read: Callable[[], T]) -> T:
    """Return a config that is here, or one that is looked up on the hub."""
    return read() if os.path.exists(where) else look_up(f"the config of {where}", read)


_HUB_HINT = (
    " It is neither a file nor a folder here, so it was looked up on the Hugging Face hub. Without network, download the "
    "model's config.json and pass its path, or set HF_HUB_OFFLINE=1 to use what was downloaded before; for a gated model, run "
    "`hf auth login` first."
)


def build_on_meta(config: PretrainedConfig, *, trust_remote_code: bool = False) -> nn.Module:
    """Build a config's model on the meta device, in the config's dtype (bfloat16 where it names none).

    Args:
        config: Any config of a language or vision-language model; it is left as it is.
        trust_remote_code: Whether Python code that comes with the model may run.

    Returns:
        The model that ``architectures`` names, else the one of transformers' auto classes, in eval mode.

    Raises:
        ModelError: No model belongs to the config, or it cannot be built.
    """
    if not isinstance(config, PretrainedConfig):
        raise ModelError(f"A model, its config, or the name of one is needed, got {type(config).__name__}.")
    logger.info("building the %s model without its weights", config.model_type)
    config = copy.deepcopy(config)
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.bfloat16
    try:
        with torch.device("meta"):
            model: nn.Module = _build(config, dtype, trust_remote_code)
    except ModelError:
        raise
    except Exception as error:  # a model's own code, remote code too, may raise anything
        raise ModelError(f"Cannot build the {config.model_type} model of this config: {_one_line(error)}") from error
    return model.eval()


def model_class(config: PretrainedConfig, *, trust_remote_code: bool = False) -> Any:
    """Return the class of a config's model: the one that ``architectures`` names, else one of transformers' auto classes.

    Raises:
        ModelError: No language or vision-language model belongs to the config.
    """
    named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()]
    if named and isinstance(named[0], type) and issubclass(named[0], transformers.PreTrainedModel):
        return named[0]
    remote = getattr(config, "auto_map", None) or {}
    for name in _AUTO_CLASSES:
        auto = getattr(transformers, name)
        if type(config) in auto._model_mapping or (trust_remote_code and name in remote):
            return auto
    raise ModelError(f"transformers {transformers.__version__} has no language model for model_type {config.model_type!r}.")


def _build(config: PretrainedConfig, dtype: Any, trust_remote_code: bool) -> Any:
    kind = model_class(config, trust_remote_code=trust_remote_code)
    if issubclass(kind, transformers.PreTrainedModel):
        return kind._from_config(config, dtype=dtype)
    return kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
