"""Experts of which each process holds some: pairs are dropped where a process still sees all K of a token.

::

    keep = rule(weights_TK, ...)                            in front of what brings tokens to the experts
    all-reduce    ids = where(keep, ids, E)          an expert that nobody holds: no process computes the pair
    all-to-all    one row, one expert a kept pair    what is dropped is not sent
    dispatch      keep = ids < experts held here     by the marker (``experts.held_dispatch``): the pass computes no other

transformers hands the dispatch the id E / processes, and the weight 0, for a pair whose expert lives elsewhere. Keep-rules that
weigh a token's pairs against each other would see those zeros, so they are asked before.

NOTE [what is counted] Processes that hold the same tokens (a tensor-parallel group) take the same decisions. Each counts the
pairs whose expert lies in its own column of the mesh, and so all of them together count each pair once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modes_fx.graph.experts import site_of
from modes_fx.models.sharding import expert_parallel, sends
from modes_fx.passes.compact import add_rows
from modes_fx.passes.site import Reject
from modes_fx.policies import decide, rerouted

_KNOWN = ("AutoEP", "AllReduceEP", "AllToAllEP")


class ExpertParallel:
    """Drops pairs in front of experts of which each process holds some; stands where transformers has put their ``forward``.

    Args:
        experts: The module, which knows its site.

    Attributes:
        implementation: What brings the tokens to the experts.

    Raises:
        Reject: ``EXPERT_PARALLEL``: it is none of transformers' collectives.
    """

    def __init__(self, experts: nn.Module) -> None:
        found: Any = expert_parallel(experts)
        name = type(found).__name__
        if name not in _KNOWN or not type(found).__module__.startswith("transformers.") or getattr(found, "megamoe", None):
            how = "an unknown way" if found is None else name
            advice = 'load the model with ep_implementation="all_reduce" or "all_to_all"'
            raise Reject("EXPERT_PARALLEL", f"tokens reach the experts by {how}: {advice}")
        self.implementation = found
        self._experts = experts
        self._forward = vars(experts)["forward"]
        self._held: int = found.num_local_experts
        self._everywhere = self._held * found.ep_mesh.size()
        self._column, self._columns = found.tp_mesh.get_local_rank(), found.tp_mesh.size()
        self._tokens_of = found.tp_mesh  # the processes that hold the same tokens
        self._sends: Any = found if name == "AllToAllEP" else getattr(found, "all_to_all", None)
        if self._sends is not None:
            self._sends.tp_mesh = _OneProcess()  # tokens are shared out here, before their pairs are dropped
        vars(experts)["forward"] = self.forward

    def remove(self) -> None:
        """Give the module its ``forward`` back, and the collectives their mesh."""
        if self._sends is not None:
            self._sends.tp_mesh = self._tokens_of
        vars(self._experts)["forward"] = self._forward

    def forward(self, hidden_states: Any, top_k_index: Tensor, top_k_weights: Any) -> Tensor:
        """Run the experts on the pairs that the rule keeps.

        Args:
            hidden_states: [T, H].
            top_k_index: int64 [T, K].
            top_k_weights: [T, K].
        """
        hidden, ids, weights = _local(hidden_states), top_k_index, _local(top_k_weights)
        keep, ids, weights = self._decided(ids, weights)
        if sends(self.implementation) or (self._sends is not None and torch.is_grad_enabled() and hidden.requires_grad):
            return self._send(hidden, ids, weights, keep)
        out: Tensor = self._forward(hidden, torch.where(keep, ids, self._everywhere), weights)
        return out

    def _decided(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return bool [T, K], the pairs to compute, and their experts and weights."""
        site = site_of(self._experts)
        if site is None or site.runtime.suspended:
            return torch.ones_like(ids, dtype=torch.bool), ids, weights
        runtime, forward = site.runtime, site.runtime.running()
        given = runtime.given(site.layer, len(ids), ids.device)
        ids = rerouted(runtime.rule, ids, weights, *given)
        keep, new = decide(runtime.rule.keep, ids, weights, *given)
        if forward is not None:
            forward.note(site.layer, given[0], keep, ids, ids // self._held % self._columns == self._column)
        return keep, ids, weights if new is None else new

    def _send(self, hidden: Tensor, ids: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
        """Send the kept pairs of this process's share of the tokens, and gather what the others made of theirs."""
        share = -(-len(hidden) // self._columns)
        mine = slice(self._column * share, (self._column + 1) * share)
        own, ids, weights, keep = hidden[mine], ids[mine], weights[mine], keep[mine]
        pairs = keep.reshape(-1).nonzero().squeeze(1)
        tokens = pairs // ids.shape[1]
        weights = weights.reshape(-1, 1)[pairs]
        rows = self._forward(own[tokens], ids.reshape(-1, 1)[pairs], torch.ones_like(weights))
        out = add_rows(rows * weights, tokens, own, dtype=hidden.dtype)
        if self._columns == 1:
            return out
        from torch.distributed.tensor import DTensor, Shard

        shape = hidden.shape
        whole = DTensor.from_local(out, self._tokens_of, [Shard(0)], run_check=False, shape=shape, stride=(shape[1], 1))
        return whole.full_tensor()


class _OneProcess:
    """A mesh to itself."""

    def size(self) -> int:
        return 1


def _local(value: Any) -> Tensor:
    local: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return local
