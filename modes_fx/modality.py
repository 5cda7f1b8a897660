"""Which tokens of the running forward are text, vision or padding.

The ids are built once a forward, in front of the outermost module's call, and held in a context variable: every thread (and
every asyncio task) has its own, so concurrent calls do not mix. Inside a traced decoder layer this information is gone.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._dynamo.decorators import skip

from modes_fx.errors import ModalityError

TEXT, VISION, PADDING = 0, 1, 2
MODALITIES = ("text", "vision")

Phase = Literal["prefill", "decode"]

_IMAGE_TOKEN_ATTRIBUTES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


@dataclass(frozen=True)
class Tokens:
    """The tokens of one forward.

    Attributes:
        ids: int64 [B, S], each ``TEXT``, ``VISION`` or ``PADDING``.
        phase: ``"decode"`` for a step of one token a sequence over a cache, else ``"prefill"``.
    """

    ids: Tensor
    phase: Phase
    _flat: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def flat(self, device: torch.device) -> Tensor:
        """Return the ids as int64 [T] on ``device``; copied there once a forward."""
        if device not in self._flat:
            self._flat[device] = self.ids.reshape(-1).to(device)
        return self._flat[device]


_running: ContextVar[Tokens | None] = ContextVar("modes_fx_running", default=None)
_explicit: ContextVar[Tensor | None] = ContextVar("modes_fx_explicit", default=None)


def running() -> Tokens | None:
    """Return the tokens of the forward that runs in this context, or None outside any."""
    return _running.get()


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
    token = _explicit.set(ids)
    try:
        yield
    finally:
        _explicit.reset(token)


def explicit() -> Tensor | None:
    """Return the ids given by an enclosing ``token_modality`` block, int64 [B, S], or None."""
    return _explicit.get()


def vision_token_ids(config: Any) -> tuple[int, ...]:
    """Return the ids of the placeholder tokens that images and videos occupy, from a model's config; () for a text model.

    Audio placeholders count as text: the published thresholds know two modalities, and text has the more careful one.
    """
    found = (getattr(config, name, None) for name in _IMAGE_TOKEN_ATTRIBUTES)
    return tuple(sorted({token for token in found if isinstance(token, int) and token >= 0}))


class ModalityWatch:
    """Publishes a module's tokens while it is called.

    It sits in front of the module's call, where ``Module.compile`` puts compiled code: unlike a hook, it does not travel into
    copies and pickles of the model, which are not optimised.

    Args:
        module: The module to watch; its ``forward`` takes ``input_ids`` or ``inputs_embeds``.
        vision_ids: Placeholder ids of visual tokens.
        sees_images: Whether the model has a vision tower at all. If not, every token is text.
        required: Says whether anything depends on the modality now; if not, it may stay unknown.
    """

    def __init__(
        self, module: nn.Module, vision_ids: tuple[int, ...], *, sees_images: bool, required: Callable[[], bool]
    ) -> None:
        self._module = module
        self._parameters = tuple(inspect.signature(module.forward).parameters)
        self._vision_ids = vision_ids
        self._sees_images = sees_images
        self._required = required
        self._before = module._compiled_call_impl
        module._compiled_call_impl = self._call

    def remove(self) -> None:
        """Give the module back the call that it had."""
        self._module._compiled_call_impl = self._before

    @skip  # a torch.compile around the model begins below this call
    def _call(self, *args: Any, **kwargs: Any) -> Any:
        call = self._before or self._module._call_impl
        # An outer module of the same model may have said it already.
        tokens = None if _running.get() is not None else self._tokens(args, kwargs)
        if tokens is None:
            return call(*args, **kwargs)
        outside = _running.set(tokens)
        try:
            return call(*args, **kwargs)
        finally:
            _running.reset(outside)

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tokens | None:
        inputs = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        ids = self._ids(inputs)
        if ids is None:
            return None
        if ids.shape[1] == 1 and inputs.get("past_key_values") is not None:
            return Tokens(torch.where(ids == PADDING, PADDING, TEXT), "decode")
        return Tokens(ids, "prefill")

    def _ids(self, inputs: dict[str, Any]) -> Tensor | None:
        input_ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        reference = input_ids if input_ids is not None else embeds
        if reference is None and "input_ids" not in self._parameters and not self._required():
            return None
        if reference is None:
            raise ModalityError(
                "The forward got neither input_ids nor inputs_embeds, so its tokens' modality is unknown. Pass one of them."
            )
        shape = reference.shape[:2]
        given, types = explicit(), inputs.get("mm_token_type_ids")
        if given is not None and given.shape == shape:
            ids = given.to(reference.device)
        elif input_ids is not None and (self._vision_ids or not self._sees_images):
            ids = self._from_input_ids(input_ids)
        elif types is not None and types.shape == shape:
            ids = ((types == 1) | (types == 2)).to(torch.int64)
        elif not self._sees_images:
            ids = torch.zeros(shape, dtype=torch.int64, device=reference.device)
        elif not self._required():
            return None
        else:
            wrong = "" if given is None else f" (modes_fx.token_modality() was given {list(given.shape)})"
            raise ModalityError(
                f"The modality of {list(shape)} tokens is unknown: without input_ids, call the model inside "
                f"`with modes_fx.token_modality(ids):` where ids is [batch, sequence], 0 text and 1 vision{wrong}."
            )
        return self._with_padding(ids, inputs.get("attention_mask"))

    def _from_input_ids(self, input_ids: Tensor) -> Tensor:
        visual = torch.zeros_like(input_ids, dtype=torch.bool)
        for token in self._vision_ids:
            visual |= input_ids == token
        return visual.to(torch.int64)

    @staticmethod
    def _with_padding(ids: Tensor, mask: Any) -> Tensor:
        # 4-D masks and mask dictionaries say who may look at whom, not which tokens are padding: nothing is skipped for them.
        if not isinstance(mask, Tensor) or mask.dim() == 4:
            return ids
        batch, length = ids.shape
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < length:
            raise ModalityError(
                f"attention_mask has shape {list(mask.shape)}, but the forward has {batch} sequences of {length} tokens. "
                f"Pass a mask of shape [{batch}, {length}] (longer when a cache holds earlier tokens)."
            )
        return ids.masked_fill(mask[:, -length:].to(ids.device) == 0, PADDING)


def token_ids_for(model: nn.Module) -> tuple[tuple[int, ...], bool]:
    """Return a model's visual placeholder ids and whether it has a vision tower."""
    config = getattr(model, "config", None)
    sees_images = getattr(config, "vision_config", None) is not None or bool(vision_token_ids(config))
    return vision_token_ids(config), sees_images
