"""A task's generation settings and messages, in transformers' terms."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image
from transformers import GenerationConfig

from modes_fx.errors import ModesFxError

logger = logging.getLogger(__name__)

_OF_SAMPLING = ("temperature", "top_p", "top_k")


def generation_settings(gen_kwargs: Mapping[str, Any], max_new_tokens: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Translate what a task asks for.

    Args:
        gen_kwargs: The task's; a temperature of 0 means greedy decoding, one above 0 sampling unless ``do_sample`` says no.
        max_new_tokens: Where the task names no limit.

    Returns:
        Arguments for ``generate``, and the strings that end an answer. Settings that ``generate`` does not know (those meant
        for other wrappers, such as ``image_aspect_ratio``) are left out, which is logged.
    """
    settings = dict(gen_kwargs)
    until = settings.pop("until", None) or ()
    temperature, wanted = settings.get("temperature"), settings.get("do_sample")
    settings["do_sample"] = temperature != 0 and bool(temperature if wanted is None else wanted)
    if not settings["do_sample"]:
        settings = {name: value for name, value in settings.items() if name not in _OF_SAMPLING}
    settings = {"max_new_tokens": max_new_tokens} | {name: value for name, value in settings.items() if value is not None}
    known = GenerationConfig()
    unknown = sorted(name for name in settings if not hasattr(known, name))
    if unknown:
        logger.warning("generate() knows no %s: left out", ", ".join(unknown))
    settings = {name: value for name, value in settings.items() if name not in unknown}
    return settings, (until,) if isinstance(until, str) else tuple(until)


def cut(text: str, until: Sequence[str]) -> str:
    """Return the text up to the first of the strings that end it."""
    return text[: min((place for end in until if end and (place := text.find(end)) >= 0), default=len(text))]


def chat(messages: Sequence[Mapping[str, Any]], frames: Callable[[Any], Sequence[Image.Image]]) -> list[dict[str, Any]]:
    """Translate lmms-eval's messages of one question into those that a processor's chat template takes.

    Args:
        messages: Of text, images and videos.
        frames: Reads a video's frames, which stand in its place.

    Raises:
        ModesFxError: A content of another kind, or what ``frames`` raises.
    """
    return [
        {"role": message["role"], "content": [content for part in message["content"] for content in _contents(part, frames)]}
        for message in messages
    ]


def _contents(part: Mapping[str, Any], frames: Callable[[Any], Sequence[Image.Image]]) -> list[dict[str, Any]]:
    if part["type"] == "text":
        return [{"type": "text", "text": part["text"]}]
    if part["type"] == "image":
        image = part["url"]
        return [{"type": "image", "image": image.convert("RGB") if isinstance(image, Image.Image) else image}]
    if part["type"] == "video":
        return [{"type": "image", "image": frame} for frame in frames(part["url"])]
    raise ModesFxError(
        f"--model modes_fx reads text, images and videos, and a question has content of type {part['type']!r}. Choose another "
        "task."
    )
