"""A module's call taken over through its class: seen by all callers, gone from copies, undone without a trace."""

import copy
import pickle
from typing import Any

import torch
from torch import Tensor, nn

from modes_fx.graph.takeover import Call, Takeover


class Adds(Takeover):
    def __init__(self, module: nn.Module, number: float) -> None:
        super().__init__(module)
        self.number = number

    def call(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return call(*args, **kwargs) * 10 + self.number


def test_of_several_the_last_made_runs_first_and_goes_first() -> None:
    module, x = nn.Identity(), torch.zeros(1)
    first, second = Adds(module, 1), Adds(module, 2)
    assert module(x) == 12
    assert torch.compile(module, backend="eager", fullgraph=True)(x) == 12
    second.remove()
    assert module(x) == 1
    first.remove()
    assert (type(module), module(x).item()) == (nn.Identity, 0.0)
    assert not [name for name in vars(module) if name.startswith("_modes_fx")]


def test_it_stands_in_front_of_hooks_and_of_a_forward_that_was_replaced() -> None:
    module = nn.Identity()
    module.forward = lambda x: x + 5
    module.register_forward_hook(lambda *call: call[-1] + 1)
    Adds(module, 2)
    assert module(torch.zeros(1)) == 62


def test_to_whoever_asks_it_is_the_same_class() -> None:
    module = nn.Linear(2, 2)
    Adds(module, 1)
    stock = nn.Linear
    assert isinstance(module, stock)
    assert (type(module).__name__, type(module).__module__, str(type(module))) == (
        stock.__name__, stock.__module__, str(stock),
    )  # fmt: skip


def test_copies_and_pickles_are_stock() -> None:
    module: Any = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    Adds(module, 1)
    Adds(module[0], 2)
    x = torch.ones(1, 2)
    stock: Tensor = module[1](torch.nn.functional.linear(x, module[0].weight, module[0].bias))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(module)):
        assert type(twin) is nn.Sequential
        assert "_modes_fx_takeover" not in vars(twin)
    assert copy.deepcopy(module)(x).equal(stock)


def test_what_was_compiled_before_follows_later_takeovers_and_removals() -> None:
    module, x = nn.Identity(), torch.ones(1)
    first = Adds(module, 1)
    compiled = torch.compile(module, backend="eager", fullgraph=True)  # holds the method of the class that it finds
    assert compiled(x) == 11
    first.remove()
    assert compiled(x) == 1
    Adds(module, 2)
    assert compiled(x) == 12
