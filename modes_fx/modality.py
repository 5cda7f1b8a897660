"""What tokens can be: text, vision or padding; how a caller states it, and how a config tells it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modes_fx.errors import ModalityError

TEXT, VISION, PADDING = 0, 1, 2
CLASSES = PADDING + 1
MODALITIES = ("text", "vision")

Phase = Literal["prefill", "decode"]

_IMAGE_TOKEN_ATTRIBUTES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


class _Stated(threading.local):
    __slots__ = ()  # as in ``graph.running``

    def __init__(self) -> None:  # in every thread: dynamo does not guard an attribute that the class alone has
        self.ids: Tensor | None = None


_stated = _Stated()


@contextlib.contextmanager
def token_modality(ids: Tensor) -> Iterator[None]:
    """State the modality of each token, for forwards that have no ``input_ids`` to read it from.

    Args:
        ids: Integer or bool [B, S]: 0 (False) text, 1 (True) vision, 2 padding. It applies to every forward of that shape
            inside the ``with`` block, in this thread; forwards of another shape (decoding steps, say) use their own
            ``input_ids``.

    Raises:
        ModalityError: ``ids`` is not such a tensor.
    """
    if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex():
        raise ModalityError(
            f"token_modality() needs an integer or bool tensor of shape [batch, sequence], got {ids.dtype} {list(ids.shape)}."
        )
    ids = ids.to(torch.int64)
    if ids.numel() and not bool(((ids >= TEXT) & (ids <= PADDING)).all()):
        raise ModalityError("token_modality() takes 0 (text), 1 (vision) and 2 (padding) only.")
    before, _stated.ids = _stated.ids, ids
    try:
        yield
    finally:
        _stated.ids = before


def explicit() -> Tensor | None:
    """Return the ids given by an enclosing ``token_modality`` block of this thread, int64 [B, S], or None."""
    return _stated.ids


_ONE_A_TOKEN = ("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids", "attention_mask")


def check_shapes(inputs: Mapping[str, Any], name: str) -> None:
    """Refuse a forward whose arguments contradict each other, by their shapes alone.

    NOTE [placeholders without pixels] They are let through, as stock lets them: to look for placeholders in the ids would make
    every forward wait for the device, and what stands in their places may come from elsewhere (a cache, a hook). Pixels for
    another number of placeholders stock refuses itself, with both numbers.

    Args:
        inputs: All arguments by name.
        name: Of the one that holds the tokens, [B, S, ...]: ``input_ids`` or ``inputs_embeds``.

    Raises:
        ModalityError: One of those that say something of each token has another shape, or images come without their sizes.
    """
    batch, length = inputs[name].shape[:2]
    for other in _ONE_A_TOKEN if inputs.get("past_key_values") is None else ():  # a cache holds tokens that some still speak of
        given = inputs.get(other)
        if not isinstance(given, Tensor) or given.dim() != 2 or given.shape == (batch, length):
            continue
        # stock takes the mask of a cache that it cannot see here, such as a recurrent model's: its last columns are the tokens'
        if other != "attention_mask" or given.shape[0] != batch or given.shape[1] < length:
            raise ModalityError(
                f"{other} has shape {list(given.shape)}, but {name} holds {batch} sequences of {length} tokens. Pass one entry "
                "a token: pad, cut and concatenate all that the processor returns together."
            )
    positions = inputs.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() and positions.shape[-1] not in (1, length):
        raise ModalityError(
            f"position_ids has shape {list(positions.shape)}, but {name} holds {batch} sequences of {length} tokens. Pass one "
            "position a token, or none."
        )
    for pixels, sizes in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
        if sizes in inputs and inputs.get(pixels) is not None and inputs[sizes] is None:
            raise ModalityError(f"The forward got {pixels} without {sizes}. Pass all that the processor returns.")


def vision_token_ids(config: Any) -> tuple[int, ...]:
    """Return the ids of the placeholder tokens that images and videos occupy, from a model's config; () for a text model.

    Audio placeholders count as text: the published thresholds know two modalities, and text has the more careful one.
    """
    configs = (config, getattr(config, "thinker_config", None))  # speaking models nest the model that sees
    found = (getattr(part, name, None) for part in configs for name in _IMAGE_TOKEN_ATTRIBUTES)
    return tuple(sorted({token for token in found if isinstance(token, int) and token >= 0}))


def token_ids_for(model: nn.Module) -> tuple[tuple[int, ...], bool]:
    """Return a model's visual placeholder ids and whether it has a vision tower."""
    config = getattr(model, "config", None)
    sees_images = getattr(config, "vision_config", None) is not None or bool(vision_token_ids(config))
    return vision_token_ids(config), sees_images
