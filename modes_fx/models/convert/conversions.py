"""Put stand-ins in the place of blocks, and take them away again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modes_fx.errors import NotOptimizedError
from modes_fx.graph.takeover import Call, Takeover
from modes_fx.models.convert.form import StandIn
from modes_fx.passes.site import Reject, SiteRecord

if TYPE_CHECKING:
    from modes_fx.models.layers import MoeLayer

logger = logging.getLogger(__name__)


class Conversions:
    """The stand-ins of one optimised model.

    A stand-in takes over a block's call, in any trace too; copies and pickles of the model are stock models.
    """

    def __init__(self) -> None:
        self._done: dict[nn.Module, _Converted] = {}

    def __len__(self) -> int:
        return len(self._done)

    def convert(self, layers: Sequence[MoeLayer]) -> tuple[list[MoeLayer], dict[int, SiteRecord]]:
        """Convert each layer that has a form.

        Returns:
            The layers, with the stand-in for block and experts where there is one; and the reasons of those refused, by index.
        """
        converted, refused = list(layers), {}
        if number := sum(layer.form is not None for layer in layers):
            logger.info("converting %d MoE blocks: the weights of each are moved together", number)
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
            self._done[layer.block] = _Converted(layer.block, stand_in)
            converted[index] = replace(layer, experts=stand_in.experts, block=stand_in.block, stands_for=layer.block, form=None)
        return converted, refused

    def undo(self, place: nn.Module | None = None) -> None:
        """Give one block, or all, their own call and weights back."""
        for block in [place] if place is not None else list(self._done):
            converted = self._done.pop(block)
            converted.remove()
            converted.stand_in.experts.release()


class _Converted(Takeover):
    """Calls the stand-in, as long as it stands for the block's weights as they are."""

    def __init__(self, block: nn.Module, stand_in: StandIn) -> None:
        super().__init__(block)
        self.stand_in = stand_in

    def call(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the stand-in."""
        if self.module.training:
            raise NotOptimizedError(
                f"This {type(self.module).__name__} was converted, which serves inference alone. Call model.eval(), or "
                "modes_fx.restore(model) to train."
            )
        # Not asked inside a graph, which takes weights that were moved as other inputs.
        if not torch.compiler.is_compiling() and self.stand_in.experts.is_stale():
            raise NotOptimizedError(
                f"The experts' weights of this {type(self.module).__name__} were moved or replaced after optimize(). Call "
                "modes_fx.restore(model) and modes_fx.optimize(model) again."
            )
        return self.stand_in.block(*args, **kwargs)
