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

from modes_fx import modality
from modes_fx.errors import ModalityError
from modes_fx.graph.running import RUNNING, Forward
from modes_fx.graph.runtime import Runtime
from modes_fx.graph.takeover import Call, Takeover
from modes_fx.modality import PADDING, TEXT, VISION, Phase, token_ids_for
from modes_fx.models.layers import MoeLayer

_TAKES_TOKENS = {"inputs_embeds"}
_TAKES_PIXELS = {"pixel_values", "pixel_values_videos", "grid_thw"}
_TAKES_CANVAS = {"decoder_input_ids"}  # of a block diffusion decoder: tokens that are being generated
_EXPERT_GROUPS = {"text_moe": False, "vision_moe": True}  # the parents of ernie4_5_vl_moe's experts


def watch_modality(model: nn.Module, layers: Sequence[MoeLayer], runtime: Runtime, check: Callable[[], None]) -> list[Watch]:
    """Watch each module, on the way down to the MoE layers, that knows its tokens.

    Args:
        model: The model.
        layers: Its MoE layers.
        runtime: The model's.
        check: Called at the beginning of each forward.
    """
    vision_ids, sees_images = token_ids_for(model)
    experts = {id(layer.experts if layer.stands_for is None else layer.stands_for) for layer in layers}
    watches: list[Watch] = []
    for module in list(model.modules()):
        if not any(id(part) in experts for part in module.modules()):
            continue
        takes = set(inspect.signature(module.forward).parameters)
        if takes & _TAKES_TOKENS:
            watches.append(ModalityWatch(module, runtime, vision_ids, sees_images, check))
        elif takes & _TAKES_PIXELS and "input_ids" not in takes:
            watches.append(OneClassWatch(module, runtime, VISION, "prefill"))
        elif takes & _TAKES_CANVAS and "input_ids" not in takes:
            watches.append(OneClassWatch(module, runtime, TEXT, "decode"))
    if not watches:
        watches.append(ModalityWatch(model, runtime, vision_ids, sees_images, check))
    for layer in layers:
        parent = layer.name.rpartition(".")[0]
        if (group := _EXPERT_GROUPS.get(parent.rpartition(".")[2])) is not None:
            watches.append(GroupWatch(model.get_submodule(parent), runtime, vision=group))
    return watches


class Watch(Takeover):
    """Publishes the forward that runs while a module is called.

    Args:
        module: The module to watch.
        runtime: The model's.
    """

    def __init__(self, module: nn.Module, runtime: Runtime) -> None:
        super().__init__(module)
        self._runtime = runtime

    def call(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's own call inside its forward."""
        outside = RUNNING.forward
        mine = outside if outside is None or outside.runtime is self._runtime else None
        forward = self._forward(mine, args, kwargs)
        RUNNING.forward = forward
        try:
            result = call(*args, **kwargs)
            if forward is not None and mine is None:
                forward.end()
            return result
        finally:
            RUNNING.forward = outside

    def _forward(self, outer: Forward | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Forward | None:
        """Return what to publish, given what is published outside and the call's arguments."""
        raise NotImplementedError


class OneClassWatch(Watch):
    """Publishes tokens that are all of one class, whatever runs outside.

    Args:
        module: The module to watch, such as a vision tower.
        runtime: The model's.
        token_class: Theirs; their number is not known in advance.
        phase: Theirs.
    """

    def __init__(self, module: nn.Module, runtime: Runtime, token_class: int, phase: Phase) -> None:
        super().__init__(module, runtime)
        self._class = token_class
        self._phase: Phase = phase

    def _forward(self, outer: Forward | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Forward | None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        device = self._runtime.in_force.bounds.device if given is None else given.device
        ids = torch.full((), self._class, dtype=torch.int64, device=device)
        return _begin(self._runtime, ids, self._phase) if outer is None else outer.narrowed(ids, self._phase)


class GroupWatch(Watch):
    """Narrows the running forward's tokens to those that a group of experts sees.

    Args:
        module: The MoE block of one group.
        runtime: The model's.
        vision: Whether it is the group for visual tokens.
    """

    def __init__(self, module: nn.Module, runtime: Runtime, *, vision: bool) -> None:
        super().__init__(module, runtime)
        self._vision = vision

    def _forward(self, outer: Forward | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Forward | None:
        return outer and outer.of_group(self._vision)


class ModalityWatch(Watch):
    """Publishes the tokens that a model or a language model is called with.

    Args:
        module: The module to watch; its ``forward`` takes ``input_ids`` or ``inputs_embeds``.
        runtime: The model's.
        vision_ids: Placeholder ids of visual tokens.
        sees_images: Whether the model has a vision tower at all. If not, every token is text.
        check: Called where no forward runs around.
    """

    def __init__(
        self, module: nn.Module, runtime: Runtime, vision_ids: tuple[int, ...], sees_images: bool, check: Callable[[], None]
    ) -> None:
        self._parameters = tuple(inspect.signature(module.forward).parameters)
        super().__init__(module, runtime)
        self._vision_ids = vision_ids
        self._sees_images = sees_images
        self._check = check

    def _forward(self, outer: Forward | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Forward | None:
        inputs = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        name = "inputs_embeds" if inputs.get("input_ids") is None else "input_ids"
        reference = inputs.get(name)
        own = inputs.get("encoder_hidden_states") is not None  # a decoder that an encoder's tokens run in front of
        if outer is not None and not own and (reference is None or _fits(outer, reference)):
            return outer  # an outer module of the same model has said it already, and no token was dropped since
        if outer is None:
            self._check()
            if reference is not None:
                modality.check_shapes(inputs, name)
        ids = self._ids(inputs, reference)
        if ids is None:
            return None
        phase: Phase = "prefill"
        groups = inputs.get("moe_mm_token_type_ids")
        if ids.shape[1] == 1 and inputs.get("past_key_values") is not None:
            ids, phase, groups = torch.where(ids == PADDING, PADDING, TEXT), "decode", None
        groups = None if groups is None else groups.bool()
        return _begin(self._runtime, ids, phase, groups) if outer is None else outer.narrowed(ids, phase, groups)

    def _ids(self, inputs: dict[str, Any], reference: Tensor | None) -> Tensor | None:
        if reference is None and "input_ids" not in self._parameters and self._runtime.in_force.keeps_all:
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
        elif self._runtime.in_force.keeps_all:
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
        batch, length = ids.shape
        if isinstance(mask, dict):  # one for each kind of attention: in all of them a token may look at itself
            mask = next((each for each in mask.values() if isinstance(each, Tensor)), None)
        if not isinstance(mask, Tensor):
            return ids
        if mask.dim() == 4 and not (mask.dtype == torch.bool or mask.is_floating_point()):
            return ids  # which of its numbers mean "may look" is between caller and attention
        if mask.dim() == 4:
            blind = _blind(mask)
            return ids.masked_fill(blind.to(ids.device), PADDING) if blind.shape == ids.shape else ids
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < length:
            raise ModalityError(
                f"attention_mask has shape {list(mask.shape)}, but the forward has {batch} sequences of {length} tokens. "
                f"Pass a mask of shape [{batch}, {length}] (longer when a cache holds earlier tokens)."
            )
        return ids.masked_fill(mask[:, -length:].to(ids.device) == 0, PADDING)


def _blind(mask: Tensor) -> Tensor:
    """Return bool [B, S]: the tokens that may look at nothing, not even at themselves, which is padding in front.

    ``generate`` hands such a mask to models over a static cache. It does not tell padding behind a sequence: whose columns they
    are in a cache that holds more is not said.

    Args:
        mask: Bool (True: may look) or additive, [B, heads or 1, S, keys].
    """
    may_look = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    return ~may_look.any(dim=-1).any(dim=1)


def _begin(runtime: Runtime, ids: Tensor, phase: Phase, expert_groups: Tensor | None = None) -> Forward:
    """Begin a forward of the model, under what is in force now."""
    if not torch.compiler.is_compiling():
        runtime.follow(ids.device)
    return Forward(runtime, runtime.in_force.snapshot(), ids, phase, expert_groups)


def _fits(forward: Forward, reference: Tensor) -> bool:
    rows = reference.numel() // reference.shape[-1] if reference.is_floating_point() else reference.numel()
    return not forward.ids.dim() or forward.ids.numel() == rows
