"""Watches: they stand in front of a model's modules and publish which tokens run, once a forward.

Three kinds of modules know something about the tokens below them: those that take the tokens of a language model, those whose
tokens are all of one kind (a vision tower), and experts that see one modality's tokens only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.decorators import skip

from modes_fx import modality
from modes_fx.errors import ModalityError
from modes_fx.modality import PADDING, RUNNING, TEXT, VISION, Tokens, token_ids_for
from modes_fx.regions import MoeLayer, Region

_TAKES_TOKENS = {"inputs_embeds"}
_TAKES_PIXELS = {"pixel_values", "pixel_values_videos", "grid_thw"}
_TAKES_CANVAS = {"decoder_input_ids"}  # of a block diffusion decoder: tokens that are being generated
_EXPERT_GROUPS = {"text_moe": False, "vision_moe": True}  # the parents of ernie4_5_vl_moe's experts


def watch_modality(
    model: nn.Module,
    layers: Sequence[MoeLayer],
    region: Region,
    required: Callable[[], bool],
    forward_ended: Callable[[], None],
) -> list[Watch]:
    """Watch each module, on the way down to the regions, that knows its tokens.

    Args:
        model: The model.
        layers: Its MoE layers.
        region: What is compiled. A watch stands in front of a region, never inside.
        required: Says whether anything depends on the modality now; if not, it may stay unknown.
        forward_ended: Called after each forward.
    """
    vision_ids, sees_images = token_ids_for(model)
    regions = [layer.region(region) for layer in layers]
    inside = {id(part) for module in regions for part in module.modules() if part is not module}
    experts = {id(layer.experts if layer.stands_for is None else layer.stands_for) for layer in layers}
    watches: list[Watch] = []
    for module in model.modules():
        if id(module) in inside or not any(id(part) in experts for part in module.modules()):
            continue
        takes = set(inspect.signature(module.forward).parameters)
        if takes & _TAKES_TOKENS:
            watches.append(ModalityWatch(module, vision_ids, sees_images, required, forward_ended))
        elif takes & _TAKES_PIXELS and "input_ids" not in takes:
            watches.append(OneClassWatch(module, Tokens(torch.tensor(VISION), "prefill")))
        elif takes & _TAKES_CANVAS and "input_ids" not in takes:
            watches.append(OneClassWatch(module, Tokens(torch.tensor(TEXT), "decode")))
    if not watches:
        watches.append(ModalityWatch(model, vision_ids, sees_images, required, forward_ended))
    for layer in layers:
        parent = layer.name.rpartition(".")[0]
        if (group := _EXPERT_GROUPS.get(parent.rpartition(".")[2])) is not None:
            watches.append(GroupWatch(model.get_submodule(parent), vision=group))
    return watches


class Watch:
    """Publishes tokens while a module is called.

    It sits in front of the module's call, where ``Module.compile`` puts compiled code: unlike a hook, it does not travel into
    copies and pickles of the model, which are not optimised.

    Args:
        module: The module to watch.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._before = module._compiled_call_impl
        module._compiled_call_impl = self._call

    def remove(self) -> None:
        """Give the module back the call that it had."""
        self._module._compiled_call_impl = self._before

    @skip  # a torch.compile around the model begins below this call
    def _call(self, *args: Any, **kwargs: Any) -> Any:
        call = self._before or self._module._call_impl
        outside = RUNNING.set(self._about(args, kwargs))  # no context manager: dynamo cannot trace one from its own frame
        try:
            result = call(*args, **kwargs)
        finally:
            RUNNING.reset(outside)
        self._ended()
        return result

    def _ended(self) -> None:
        """Called after each call that raised nothing."""

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _about(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tokens | None:
        return self._tokens(modality.running(), args, kwargs)

    def _tokens(self, outer: Tokens | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tokens | None:
        """Return what to publish, given what is published outside and the call's arguments."""
        raise NotImplementedError


class OneClassWatch(Watch):
    """Publishes tokens that are all of one class, whatever runs outside.

    Args:
        module: The module to watch, such as a vision tower.
        tokens: Tokens without dimensions: their number is not known in advance.
    """

    def __init__(self, module: nn.Module, tokens: Tokens) -> None:
        super().__init__(module)
        self._published = tokens

    def _tokens(self, outer: Tokens | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tokens | None:
        # Each call its own, since the number of tokens varies.
        return Tokens(self._published.ids, self._published.phase)


class GroupWatch(Watch):
    """Narrows the running forward's tokens to those that a group of experts sees.

    Args:
        module: The MoE block of one group.
        vision: Whether it is the group for visual tokens.
    """

    def __init__(self, module: nn.Module, *, vision: bool) -> None:
        super().__init__(module)
        self._vision = vision

    def _tokens(self, outer: Tokens | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tokens | None:
        return outer and outer.of_group(self._vision)


class ModalityWatch(Watch):
    """Publishes the tokens that a model or a language model is called with.

    Args:
        module: The module to watch; its ``forward`` takes ``input_ids`` or ``inputs_embeds``.
        vision_ids: Placeholder ids of visual tokens.
        sees_images: Whether the model has a vision tower at all. If not, every token is text.
        required: Says whether anything depends on the modality now; if not, it may stay unknown.
        forward_ended: Called after each call that is inside of no other watched one.
    """

    def __init__(
        self,
        module: nn.Module,
        vision_ids: tuple[int, ...],
        sees_images: bool,
        required: Callable[[], bool],
        forward_ended: Callable[[], None],
    ) -> None:
        super().__init__(module)
        self._parameters = tuple(inspect.signature(module.forward).parameters)
        self._vision_ids = vision_ids
        self._sees_images = sees_images
        self._required = required
        self._forward_ended = forward_ended

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _ended(self) -> None:
        if modality.running() is None:
            self._forward_ended()

    def _tokens(self, outer: Tokens | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tokens | None:
        inputs = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        reference = inputs.get("inputs_embeds") if inputs.get("input_ids") is None else inputs["input_ids"]
        own = inputs.get("encoder_hidden_states") is not None  # a decoder that an encoder's tokens run in front of
        if outer is not None and not own and (reference is None or _fits(outer, reference)):
            return outer  # an outer module of the same model has said it already, and no token was dropped since
        ids = self._ids(inputs, reference)
        if ids is None:
            return None
        if ids.shape[1] == 1 and inputs.get("past_key_values") is not None:
            return Tokens(torch.where(ids == PADDING, PADDING, TEXT), "decode")
        groups = inputs.get("moe_mm_token_type_ids")
        return Tokens(ids, "prefill", None if groups is None else groups.bool())

    def _ids(self, inputs: dict[str, Any], reference: Tensor | None) -> Tensor | None:
        if reference is None and "input_ids" not in self._parameters and not self._required():
            return None
        if reference is None:
            raise ModalityError(
                "The forward got neither input_ids nor inputs_embeds, so its tokens' modality is unknown. Pass one of them."
            )
        shape = reference.shape[:2]
        input_ids = inputs.get("input_ids")
        given, types, groups = modality.explicit(), inputs.get("mm_token_type_ids"), inputs.get("moe_mm_token_type_ids")
        if given is not None and given.shape == shape:
            ids = given.to(reference.device)
        elif groups is not None and groups.shape == shape:
            ids = (groups != 0).to(torch.int64)
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


def _fits(tokens: Tokens, reference: Tensor) -> bool:
    rows = reference.numel() // reference.shape[-1] if reference.is_floating_point() else reference.numel()
    return not tokens.ids.dim() or tokens.ids.numel() == rows
