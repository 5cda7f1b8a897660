"""Put stand-ins in the place of blocks, and take them away again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modes_fx.convert.form import StandIn
from modes_fx.errors import ModelError, NotOptimizedError
from modes_fx.passes.site import Reject, SiteRecord

if TYPE_CHECKING:
    from modes_fx.regions import MoeLayer


_called: ContextVar[frozenset[object]] = ContextVar("modes_fx_called_stand_ins", default=frozenset())
"""Whose stand-ins the running forward has called; a context variable, since forwards of other threads end at any time."""


class Conversions:
    """The stand-ins of one optimised model.

    A stand-in takes a block's place through the block's call, where ``Module.compile`` puts compiled code: unlike a replaced
    forward or a hook it does not travel into copies and pickles, which are stock models.
    """

    def __init__(self) -> None:
        self._done: dict[nn.Module, tuple[StandIn, Any]] = {}
        self._key = object()

    def __len__(self) -> int:
        return len(self._done)

    def convert(self, layers: Sequence[MoeLayer]) -> tuple[list[MoeLayer], dict[int, SiteRecord]]:
        """Convert each layer that has a form.

        Returns:
            The layers, with the stand-in for block and experts where there is one; and the reasons of those refused, by index.
        """
        converted, refused = list(layers), {}
        for index, layer in enumerate(layers):
            if layer.form is None:
                continue
            try:
                if layer.block.training:
                    raise Reject("TRAINING", "the block is in training mode; call model.eval() and optimise again")
                stand_in = layer.form.convert(layer.block)
            except Reject as reason:
                refused[index] = SiteRecord("", layer.name, "rejected", reason.code, reason.detail)
                continue
            self._done[layer.block] = stand_in, layer.block._compiled_call_impl
            layer.block._compiled_call_impl = _Call(layer.block, stand_in, self._note_call)
            converted[index] = replace(layer, experts=stand_in.experts, block=stand_in.block, stands_for=layer.block, form=None)
        return converted, refused

    def _note_call(self) -> None:
        _called.set(_called.get() | {self._key})

    def check_called(self) -> None:
        """Refuse what passes all stand-ins by: a trace around the model inlines the blocks' own code.

        Raises:
            ModelError: A forward has ended, and no stand-in was called since the last one.
        """
        called = _called.get()
        _called.set(called - {self._key})
        if self._done and self._key not in called:
            raise ModelError(
                f"A forward ran {type(next(iter(self._done))).__name__}'s own code and skipped nothing: a torch.compile around "
                "the model passes its converted blocks by. Run it without, or call modes_fx.restore(model)."
            )

    def undo(self, place: nn.Module | None = None) -> None:
        """Give one block, or all, their own call and weights back."""
        for block in [place] if place is not None else list(self._done):
            stand_in, before = self._done.pop(block)
            block._compiled_call_impl = before
            stand_in.experts.release()


class _Call:
    """Calls the stand-in, as long as it stands for the block's weights as they are."""

    def __init__(self, block: nn.Module, stand_in: StandIn, note: Callable[[], None]) -> None:
        self._block = block
        self._stand_in = stand_in
        self._note = note

    @torch._dynamo.disable(reason="a block that modes_fx converted is compiled on its own")  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._block.training:
            raise NotOptimizedError(
                f"This {type(self._block).__name__} was converted, which serves inference alone. Call model.eval(), or "
                "modes_fx.restore(model) to train."
            )
        if self._stand_in.experts.is_stale():
            raise NotOptimizedError(
                f"The experts' weights of this {type(self._block).__name__} were moved or replaced after optimize(). Call "
                "modes_fx.restore(model) and modes_fx.optimize(model) again."
            )
        self._note()
        return self._stand_in.block(*args, **kwargs)
