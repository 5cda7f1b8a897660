"""The marker in front of an expert dispatch, whose meaning is the thresholding itself.

::

    keep(weights, expert_ids, classes, bounds, table, rule, dispatch, layer) -> weights, kept

``weights`` [T, K] come back with 0 for each pair that the rule drops, and ``kept``, bool [T, K], says which it keeps.
``expert_ids`` is int64 [T, K], ``classes`` int64 [T], ``bounds`` float32 [number of classes], ``table`` the layer's for rules
that ask for one. The other arguments are constants of the graph: the rule's key, the dispatch to compute kept pairs with, and
the layer's index, or -1 in a graph that serves many layers.

NOTE [no kernel of its own] It is composed of torch's own operations, into which every exporter, interpreter and autograd take
it apart. In dynamo's graph it stands whole, where ``passes.skip_experts`` finds it. A trace runs it on fake tensors: that is
where Inductor's hook is put in force, for graphs that hold a marker and for no others.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from modes_fx.policies import decide, rule_of

_SCHEMA = (
    "keep(Tensor weights, Tensor expert_ids, Tensor classes, Tensor bounds, Tensor? table, str rule, str dispatch, int layer)"
    " -> (Tensor, Tensor)"
)


def _keep(
    weights: Tensor,
    expert_ids: Tensor,
    classes: Tensor,
    bounds: Tensor,
    table: Tensor | None,
    rule: str,
    dispatch: str,
    layer: int,
) -> tuple[Tensor, Tensor]:
    if isinstance(weights, FakeTensor):
        from modes_fx.graph import hook  # Inductor takes seconds to import

        hook.install()
    keep_TK, new_TK = decide(rule_of(rule).keep, expert_ids, weights, classes, bounds, table)
    return torch.where(keep_TK, weights if new_TK is None else new_TK, 0.0), keep_TK


_library = torch.library.Library("modes_fx", "FRAGMENT")
_library.define(_SCHEMA)
_library.impl("keep", _keep, "CompositeImplicitAutograd")

keep = torch.ops.modes_fx.keep.default
