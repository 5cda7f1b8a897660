"""What a form of block is, and what converting one gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from modes_fx.models.convert.dispatch import DispatchedExperts
from modes_fx.passes.site import Reject


@dataclass(frozen=True)
class StandIn:
    """What runs in a block's place.

    Attributes:
        block: Called with the block's arguments.
        experts: The dispatch inside it.
    """

    block: nn.Module
    experts: DispatchedExperts


@dataclass(frozen=True)
class Form:
    """One way in which blocks keep their experts out of reach.

    Attributes:
        experts_in: Returns the attribute that holds a block's experts, or None for a module of any other form.
        convert: Makes the stand-in; raises ``Reject`` and leaves the block alone where it cannot.
    """

    experts_in: Callable[[nn.Module], str | None]
    convert: Callable[[nn.Module], StandIn]


def shallow_copy(block: nn.Module, **replaced: Any) -> nn.Module:
    """Return a module that shares all with ``block`` but the given attributes.

    Parameters, buffers, hooks and other children are the block's own, not copies of them.

    Raises:
        Reject: ``FORWARD_REPLACED``: the copy would go on calling the block's own forward.
    """
    if "forward" in vars(block):
        detail = "its forward was replaced on the instance (by offloading, say), so that its code cannot be followed"
        raise Reject("FORWARD_REPLACED", detail)
    twin = copy.copy(block)
    vars(twin)["_modules"] = {name: child for name, child in block._modules.items() if name not in replaced}
    for name, value in replaced.items():
        # Into the instance: the class may define a method of that name, which nn.Module's own tables do not hide.
        vars(twin)[name] = value
    return twin
