"""Which tokens of the running forward are text, vision or padding.

The ids are built once a forward, in front of the outermost module's call, and held in a context variable: every thread (and
every asyncio task) has its own, so concurrent calls do not mix. Inside a traced decoder layer this information is gone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modes_fx.errors import ModalityError

TEXT, VISION, PADDING = 0, 1, 2
CLASSES = PADDING + 1
MODALITIES = ("text", "vision")

Phase = Literal["prefill", "decode"]

_IMAGE_TOKEN_ATTRIBUTES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


@dataclass(frozen=True)
class Tokens:
    """The tokens of one forward.

    Attributes:
        ids: int64 [B, S], each ``TEXT``, ``VISION`` or ``PADDING``. Without dimensions where all tokens are of one class and
            any number of them may come: those of a vision tower, say.
        phase: ``"decode"`` for a step of one token a sequence over a cache, else ``"prefill"``.
        expert_groups: bool [B, S], which of two groups of experts a token goes to in models that have a group for each
            modality: True the one for vision. None where all tokens go to the same experts.
    """

    ids: Tensor
    phase: Phase
    expert_groups: Tensor | None = None
    _flat: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict, repr=False)
    _groups: dict[bool, Tokens] = field(default_factory=dict, repr=False)

    def flat(self, tokens: int, device: torch.device) -> Tensor:
        """Return the ids as int64 [T] on ``device``; copied there once a forward.

        Args:
            tokens: T, as many as the block that asks was called with.
            device: Where the ids are wanted.

        Raises:
            ModalityError: The forward has another number of tokens.
        """
        if self.ids.dim() and self.ids.numel() != tokens:
            raise ModalityError(
                f"An MoE block was called with {tokens} tokens, but the running forward has {list(self.ids.shape)}. If the "
                "model drops or merges tokens on the way, call it inside `with modes_fx.token_modality(ids):`, where ids has "
                "the shape that the language model gets."
            )
        key = device, tokens
        if key not in self._flat:
            self._flat[key] = self.ids.reshape(-1).to(device).expand(tokens).contiguous()
        return self._flat[key]

    def of_group(self, vision: bool) -> Tokens:
        """Return those tokens that go to the experts for vision, or to the others; picked once a forward."""
        if self.expert_groups is None:
            return self
        if vision not in self._groups:
            mine = self.expert_groups.reshape(-1) == vision
            self._groups[vision] = Tokens(self.ids.reshape(-1)[mine].unsqueeze(0), self.phase)
        return self._groups[vision]


RUNNING: ContextVar[Tokens | None] = ContextVar("modes_fx_running", default=None)
_explicit: ContextVar[Tokens | None] = ContextVar("modes_fx_explicit", default=None)


def running() -> Tokens | None:
    """Return the tokens of the forward that runs in this context, or None outside any."""
    return RUNNING.get()


@contextlib.contextmanager
def token_modality(ids: Tensor) -> Iterator[None]:
    """State the modality of each token, for forwards that have no ``input_ids`` to read it from.

    Args:
        ids: Integer or bool [B, S]: 0 (False) text, 1 (True) vision, 2 padding. It applies to every forward of that shape
            inside the ``with`` block; forwards of another shape (decoding steps, say) use their own ``input_ids``.

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
    token = _explicit.set(Tokens(ids, "prefill"))
    try:
        yield
    finally:
        _explicit.reset(token)


def explicit() -> Tensor | None:
    """Return the ids given by an enclosing ``token_modality`` block, int64 [B, S], or None."""
    given = _explicit.get()
    return None if given is None else given.ids


def explicit_flat(tokens: int, device: torch.device) -> Tensor | None:
    """Return the ids that ``explicit`` returns, int64 [T] on ``device``, or None where they are not T; copied there once."""
    given = _explicit.get()
    return given.flat(tokens, device) if given is not None and given.ids.numel() == tokens else None


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
