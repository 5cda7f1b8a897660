"""The routing weights of the unskipped model: what thresholds will be compared with."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from modes_fx import modality
from modes_fx.modality import MODALITIES
from modes_fx.optimize import optimized_state


class RoutingRecorder:
    """Records the dispatched weights of forwards run inside its ``with`` block, uncompiled.

    Args:
        model: An optimised model.
        per_layer: Weights kept of each layer and modality, drawn at random from each forward's.
        seed: Of that draw.
    """

    def __init__(self, model: nn.Module, per_layer: int = 20_000, seed: int = 0) -> None:
        self._state = optimized_state(model)
        self._per_layer = per_layer
        self._generator = torch.Generator().manual_seed(seed)
        self._weights: list[list[list[Tensor]]] = [[[] for _ in self._state.layers] for _ in MODALITIES]
        self.pairs = [0] * len(MODALITIES)

    def __enter__(self) -> RoutingRecorder:
        self._state.regions.suspend()
        self._handles = [
            layer.experts.register_forward_pre_hook(self._hook(index), with_kwargs=True)
            for index, layer in enumerate(self._state.layers)
        ]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._state.regions.resume()

    def weights(self, modality_index: int) -> list[Tensor]:
        """Return, for each layer, a sample of the weights of one modality's tokens: float32 [at most ``per_layer``]."""
        return [self._thinned(torch.cat(parts)) if parts else torch.empty(0) for parts in self._weights[modality_index]]

    def _hook(self, layer: int) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            weights_TK = args[2] if len(args) > 2 else kwargs["top_k_weights"]
            tokens = modality.running()
            if tokens is None:
                return
            classes = tokens.flat(len(weights_TK), weights_TK.device)
            for index in range(len(MODALITIES)):
                chosen = weights_TK[classes == index].reshape(-1)
                self.pairs[index] += chosen.numel()
                self._weights[index][layer].append(self._thinned(chosen.float().cpu()))

        return record

    def _thinned(self, values: Tensor) -> Tensor:
        if len(values) <= self._per_layer:
            return values
        return values[torch.randperm(len(values), generator=self._generator)[: self._per_layer]]
