"""Gradient checkpointing: what runs again in the backward pass belongs to the forward that ran before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from modes_fx.graph.running import RUNNING, traced

_ATTRIBUTE = "_gradient_checkpointing_func"  # under which transformers' layers hold torch's checkpoint


class _InItsForward:
    """A checkpoint function that runs its part inside the forward that it was called in, whenever that is.

    Args:
        checkpoint: ``torch.utils.checkpoint.checkpoint``, with its settings.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if traced():  # a graph holds its forward's tensors
            return self.checkpoint(function, *args, **kwargs)
        forward = RUNNING.forward

        def again(*given: Any, **named: Any) -> Any:
            outside, RUNNING.forward = RUNNING.forward, forward
            try:
                return function(*given, **named)
            finally:
                RUNNING.forward = outside

        return self.checkpoint(again, *args, **kwargs)

    def __reduce__(self) -> Any:
        return _itself, (self.checkpoint,)  # copies and pickles are stock


def _itself(value: Any) -> Any:
    return value


def remember_forwards(model: nn.Module) -> None:
    """Let a model's checkpoints know their forward, those that were switched on since the last time too."""
    for part in model.modules():
        checkpoint = vars(part).get(_ATTRIBUTE)
        if checkpoint is not None and not isinstance(checkpoint, _InItsForward):
            setattr(part, _ATTRIBUTE, _InItsForward(checkpoint))


def forget_forwards(model: nn.Module) -> None:
    """Give a model its checkpoints back."""
    for part in model.modules():
        if isinstance(checkpoint := vars(part).get(_ATTRIBUTE), _InItsForward):
            setattr(part, _ATTRIBUTE, checkpoint.checkpoint)
