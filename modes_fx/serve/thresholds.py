"""The tensors that a served model's layers read and write, and the operation that drops pairs by them.

They live as long as the model and are changed in place: so compiled code and CUDA graphs see another target without being made
anew. T tokens, K experts a token, E experts, L layers of this worker.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from modes_fx.errors import ServingError
from modes_fx.modality import MODALITIES
from modes_fx.report import PHASES

PADDING = len(PHASES) * len(MODALITIES)
DUMMY = PADDING + 1
CLASSES = DUMMY + 1
"""A token's class: 2 * phase + modality, or padding, which keeps nothing, or dummy, which keeps all; neither is counted."""


class Thresholds:
    """Thresholds of all layers, the classes of the tokens of the running batch, and counts.

    Args:
        top_k: K of each layer.
        max_tokens: The most tokens of a batch, padding included.
        device: Where the model is.

    Attributes:
        bounds: float32 [L, classes].
        classes: int64 [max_tokens].
        kept: int64 [max_tokens], a view: pairs that the layers have kept so far of each token of the batch.
        batch: Tokens of the running batch, padding included; 0 before the first, and in a dummy run.
        scales: float32 [L]: what the plan's thresholds are multiplied by, where a layer scales its sum instead of its weights.
        idle: Whether no layer can drop a pair of the running batch, so that stock's own calls do; known on a CPU alone, where
            reading a tensor waits for nothing.
    """

    def __init__(self, top_k: list[int], max_tokens: int, device: torch.device) -> None:
        self.top_k = top_k
        self.bounds = torch.zeros(len(top_k), CLASSES, dtype=torch.float32, device=device)
        self.bounds[:, PADDING].fill_(math.inf)
        self.classes = torch.full((max_tokens,), DUMMY, device=device)
        self._seen = torch.ones(max_tokens, 2, dtype=torch.int64, device=device)  # of each token: itself, pairs kept
        self.kept = self._seen[:, 1]
        self.kept.zero_()
        self.batch = 0
        self.idle = False
        self.scales = torch.ones(len(top_k))
        self._inert = torch.zeros(CLASSES, dtype=torch.bool, device=device)  # classes of which all is kept, in all layers
        self._counts = torch.zeros(CLASSES, 2, dtype=torch.int64, device=device)  # tokens and pairs kept

    def set_bounds(self, bounds: Tensor) -> None:
        """Put other thresholds in force, [L, phases, modalities]; the next batch sees them."""
        self.bounds[:, :PADDING].copy_(bounds.flatten(1) * self.scales.unsqueeze(1))
        self._inert.copy_((self.bounds <= 0).all(dim=0))

    def begin(self, classes: Tensor, padded: int) -> None:
        """Begin a batch: count the one before, then note the classes of this one's tokens, [T]; padding follows."""
        self._settle()
        tokens = classes.shape[0]
        self.classes[:tokens].copy_(classes)
        self.classes[tokens:padded].fill_(PADDING)
        self.batch = padded
        self.idle = self._inert.device.type == "cpu" and bool(self._inert.index_select(0, classes).all())

    def begin_dummy(self) -> None:
        """Begin a run for its own sake, such as a warm-up: all kept, nothing counted."""
        self._settle()
        self.classes.fill_(DUMMY)
        self.idle = False

    def pairs(self) -> list[int]:
        """Return pairs routed and kept since the start: ints [modalities, phases, 2], flattened."""
        self._settle()
        tokens, kept = self._counts[:PADDING].T.tolist()
        return [
            number
            for modality in range(len(MODALITIES))
            for phase in range(len(PHASES))
            for number in (sum(self.top_k) * tokens[2 * phase + modality], kept[2 * phase + modality])
        ]

    def _settle(self) -> None:
        """Count what the last batch kept; on the device, without waiting for it."""
        if self.batch:
            if self.idle:
                self.kept[: self.batch].fill_(sum(self.top_k))
            self._counts.index_add_(0, self.classes[: self.batch], self._seen[: self.batch])
        self.kept.zero_()
        self.batch = 0


class LayerThresholds:
    """One layer's share: what ``modes_fx::serve_keep`` reads.

    Args:
        thresholds: Those of all layers.
        index: The layer's row.
        num_experts: E, which dropped pairs get as their expert.
    """

    def __init__(self, thresholds: Thresholds, index: int, num_experts: int) -> None:
        self.thresholds = thresholds
        self.index = index
        self.num_experts = num_experts
        self._bounds = thresholds.bounds[index]

    def keep(self, weights_TK: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and ids in which dropped pairs have weight 0 and expert E; see ``modes_fx.policies.threshold``.

        Raises:
            ServingError: The layer was given other tokens than the batch has.
        """
        state, tokens = self.thresholds, weights_TK.shape[0]
        if state.idle:
            return weights_TK.clone(), ids_TK.clone()
        if state.batch and tokens != state.batch:
            raise ServingError(
                f"A layer was given {tokens} tokens of a batch of {state.batch}: modes-fx cannot serve this model."
            )
        bound_T = self._bounds.index_select(0, state.classes[:tokens])
        keep_TK = weights_TK.float() >= bound_T.unsqueeze(1)
        state.kept[:tokens] += keep_TK.sum(dim=1)
        return torch.where(keep_TK, weights_TK, 0), torch.where(keep_TK, ids_TK, self.num_experts)


_find: Callable[[str], LayerThresholds] | None = None


def find_layers_by(find: Callable[[str], LayerThresholds]) -> None:
    """Say how the operation finds a layer by its name: compiled code knows nothing else of it, and may be another engine's."""
    global _find
    _find = find


def _serve_keep(weights: Tensor, ids: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """Drop pairs by the thresholds of a layer.

    Args:
        weights: [T, K], as the router gives them.
        ids: Integer [T, K].
        layer: Its name in vLLM.

    Returns:
        weights and ids, in which dropped pairs have weight 0 and expert E.
    """
    if _find is None:
        raise ServingError("modes-fx serves no model in this process.")
    return _find(layer).keep(weights, ids)


def _serve_keep_fake(weights: Tensor, ids: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weights), torch.empty_like(ids)


_library = torch.library.Library("modes_fx", "FRAGMENT")
_library.define("serve_keep(Tensor weights, Tensor ids, str layer) -> (Tensor, Tensor)")
_library.impl("serve_keep", _serve_keep, "CompositeExplicitAutograd")
torch.library.register_fake("modes_fx::serve_keep", _serve_keep_fake, lib=_library)
