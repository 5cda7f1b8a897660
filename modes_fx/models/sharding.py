"""Which processes a model's experts lie in, as transformers has sharded it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers.distributed.expert_parallel import EPImplementation


def expert_parallel(experts: nn.Module) -> EPImplementation | None:
    """Return what brings tokens to experts of which each process holds some; None where this process holds them all.

    transformers puts a function in the place of such a module's ``forward``, which calls it.
    """
    forward = vars(experts).get("forward")
    if not getattr(experts, "_is_expert_parallel", False) or forward is None:
        return None
    ours: Any = getattr(forward, "__self__", None)  # graph.expert_parallel stands in its place
    return ours.implementation if ours is not None else inspect.getclosurevars(forward).nonlocals.get("implementation")


def sends(implementation: Any) -> bool:
    """Return whether tokens travel to the experts in every call, so that sizes are read from the host."""
    return getattr(implementation, "all_reduce", None) is None and type(implementation).__name__ != "AllReduceEP"


@contextlib.contextmanager
def local_weights(experts: nn.Module) -> Iterator[None]:
    """Let a module have this process's part of each weight for the length of a block, as when transformers calls experts."""
    sharded = {name: weight for name, weight in experts._parameters.items() if hasattr(weight, "to_local")}
    for name, weight in sharded.items():
        experts._parameters[name] = nn.Parameter(weight.to_local(), requires_grad=False)
    try:
        yield
    finally:
        experts._parameters.update(sharded)
