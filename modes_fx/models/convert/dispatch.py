"""The dispatch of transformers' ``grouped_mm`` (see ``passes/grouped_mm.py``) for experts that do not come to it themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_linear

from modes_fx.graph.experts import marked, run_dispatch


class DispatchedExperts(nn.Module):
    """Experts computed pair by pair, in expert order. Subclasses hold the weights and say what one expert does.

    Args:
        num_experts: E. Ids lie below it.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def body(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Compute the experts: [S, H] to [S, H], where expert e has the rows ``offsets[e - 1]`` to ``offsets[e]``."""
        raise NotImplementedError

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Sum each token's experts' outputs, times its weights.

        Args:
            hidden: [..., H], T tokens in all.
            ids: int64 [T, K] or flat.
            weights: [T, K] or flat.
        """
        flat = hidden.reshape(-1, hidden.shape[-1])
        tokens = flat.shape[0]
        given = flat, ids.reshape(tokens, -1), weights.reshape(tokens, -1)
        return run_dispatch(self, type(self).dispatch, *given).view(hidden.shape)

    def dispatch(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Do the work of ``forward``: the very graph that the matcher anchors on."""
        top_k = ids_TK.shape[-1]
        ids_TK, weights_TK = marked(self, ids_TK, weights_TK)  # in front of the sort, where the pass decides
        weights_S = weights_TK.reshape(-1)
        ids_g, perm = torch.sort(ids_TK.reshape(-1))
        counted = ids_g.float() if hidden_TH.device.type in ("cpu", "mps") else ids_g.int()  # the types that histc takes there
        counts = torch.histc(counted, bins=self.num_experts, min=0, max=self.num_experts - 1)
        offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
        rows = self.body(hidden_TH[perm // top_k], offsets)
        weighted = rows * weights_S[perm].unsqueeze(-1)
        inverse = torch.empty_like(perm)
        inverse[perm] = torch.arange(perm.size(0), device=perm.device)
        return weighted[inverse].view(-1, top_k, hidden_TH.shape[-1]).sum(dim=1).to(hidden_TH.dtype)

    def is_stale(self) -> bool:
        """Return whether the model's weights are no longer those that are computed with."""
        return False

    def release(self) -> None:
        """Give all weights that were taken from the model back to it."""


def grouped_linear(rows: Tensor, weight_EOI: Tensor, offsets: Tensor, *, transposed: bool = False) -> Tensor:
    """Multiply each expert's rows by its matrix, [O, I] or, if ``transposed``, [I, O]: [S, I] to [S, O]."""
    result: Tensor = _grouped_linear(rows, weight_EOI, offsets, is_transposed=transposed)
    return result
