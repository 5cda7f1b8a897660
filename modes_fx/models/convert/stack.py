"""The weights of a list of expert MLPs, stacked once; the list's own parameters become views into the stack.

    experts[e].gate.weight [I, H], experts[e].up.weight [I, H]   ->  gate_up_proj [E, 2I, H]
    experts[e].down.weight [H, I]                                ->  down_proj [E, H, I]

So names, values and identities of the model's parameters stay what they were, weights loaded in place reach the stack, and
no weight exists twice: while a layer is stacked, one layer more is held.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from modes_fx.models.convert.dispatch import DispatchedExperts, grouped_linear
from modes_fx.passes.site import Reject

_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_ACTIVATIONS = ("act_fn", "activation_fn", "act")


class StackedExperts(DispatchedExperts):
    """Gated MLPs, ``down(act(gate(x)) * up(x))``.

    Args:
        experts: The list, whose parameters' data are replaced.

    Raises:
        Reject: ``EXPERT_PARALLEL``, ``EXPERTS_DIFFER``, ``EXPERTS_NOT_PLAIN`` or ``WEIGHTS_NOT_LOADED``. The list is as it was.
    """

    def __init__(self, experts: nn.ModuleList) -> None:
        super().__init__(len(experts))
        projections = _projections(experts)
        (gate, up, down), *_ = projections
        width, hidden = gate.weight.shape
        self.act_fn = next(getattr(experts[0], name) for name in _ACTIVATIONS if hasattr(experts[0], name))
        with torch.inference_mode(False), torch.no_grad():
            # Both before any weight moves: if memory does not suffice, nothing has happened.
            gate_up_proj = gate.weight.new_empty(len(experts), 2 * width, hidden)
            down_proj = down.weight.new_empty(len(experts), hidden, width)
            self._owners: list[dict[str, Any]] = []  # the tables in which the views are kept, as "weight"
            self._views: list[Tensor] = []
            self._places: list[int] = []
            for index, (gate, up, down) in enumerate(projections):
                self._move(gate, gate_up_proj[index, :width])
                self._move(up, gate_up_proj[index, width:])
                self._move(down, down_proj[index])
            self._asked = -1
            self.gate_up_proj = nn.Parameter(gate_up_proj, requires_grad=False)
            self.down_proj = nn.Parameter(down_proj, requires_grad=False)

    def _move(self, linear: nn.Linear, place: Tensor) -> None:
        linear.weight.data = place.copy_(linear.weight.data)
        self._owners.append(linear._parameters)
        self._views.append(linear.weight)
        self._places.append(place.data_ptr())

    def body(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """See ``DispatchedExperts.body``."""
        gate, up = grouped_linear(rows, self.gate_up_proj, offsets).chunk(2, dim=-1)
        return grouped_linear(self.act_fn(gate) * up, self.down_proj, offsets)

    def is_stale(self) -> bool:
        """Return whether some expert's weight is no view into the stack any more: moved, cast or replaced."""
        # To ask each tensor for its address would be a good part of a decoding step. Loading replaces parameters, which
        # is seen at once; casting and moving change the data of all: one of them, in turn, is asked.
        self._asked = (self._asked + 1) % len(self._views)
        replaced = not all(map(operator.is_, [owner["weight"] for owner in self._owners], self._views))
        return replaced or self._views[self._asked].data_ptr() != self._places[self._asked]

    def release(self) -> None:
        """Give each parameter a storage of its own again, those apart that were replaced meanwhile; drop the stack."""
        with torch.inference_mode(False), torch.no_grad():
            for owner, view, place in zip(self._owners, self._views, self._places, strict=True):
                if owner["weight"] is view and view.data_ptr() == place:
                    view.data = view.data.clone()
            self._owners, self._views, self._places = [], [], []
            for stack in (self.gate_up_proj, self.down_proj):  # compiled code may outlive this, and holds on to the parameters
                stack.data = stack.new_empty(0)


def _projections(experts: nn.ModuleList) -> list[tuple[nn.Linear, nn.Linear, nn.Linear]]:
    """Return (gate, up, down) of each expert, all of one shape, type and device."""
    if any(expert is None for expert in experts):
        raise Reject("EXPERT_PARALLEL", "some experts live in another process")
    names = next((names for names in _NAMES if all(hasattr(experts[0], name) for name in names)), None)
    if names is None or not any(hasattr(experts[0], name) for name in _ACTIVATIONS):
        known = " or ".join("/".join(names) for names in _NAMES)
        raise Reject("EXPERTS_NOT_PLAIN", f"{type(experts[0]).__name__} is no gated MLP of {known} with an activation")
    found = [tuple(getattr(expert, name) for name in names) for expert in experts]
    for linear in (linear for projections in found for linear in projections):
        if type(linear) is not nn.Linear or linear.bias is not None or "forward" in vars(linear):
            raise Reject("EXPERTS_NOT_PLAIN", f"an expert's {type(linear).__name__} is no plain nn.Linear without a bias")
    weights = [linear.weight for projections in found for linear in projections]
    on_meta = sum(weight.device.type == "meta" for weight in weights)
    if 0 < on_meta < len(weights):  # all of them: a model without weights, that is only looked at
        raise Reject("WEIGHTS_NOT_LOADED", "some experts' weights are on the meta device (offloaded, or not loaded yet)")
    kinds = {(type(weight), weight.dtype, weight.device) for weight in weights}
    shapes = {tuple(tuple(linear.weight.shape) for linear in projections) for projections in found}
    if len(kinds) > 1 or len(shapes) > 1 or len({type(expert) for expert in experts}) > 1:
        raise Reject("EXPERTS_DIFFER", "the experts differ in class, shape, dtype or device")
    if len({id(weight) for weight in weights}) < len(weights):
        raise Reject("EXPERTS_DIFFER", "some experts share a weight")
    gate, up, down = shapes.pop()
    if gate != up or down != gate[::-1] or not weights[0].is_floating_point():
        raise Reject("EXPERTS_NOT_PLAIN", f"gate {gate}, up {up} and down {down} of {weights[0].dtype} are no gated MLP")
    return found
