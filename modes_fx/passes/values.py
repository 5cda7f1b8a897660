"""What the nodes of dynamo's graph hold: fake tensors, in ``meta["example_value"]``, computed for new nodes when asked for.

AOTAutograd traces a graph from its inputs, so most of what the passes put in is never asked about; and a fake tensor whose size
depends on data takes milliseconds. A node whose value is yet to be computed has none and says so (``forget``); all others are
dynamo's own, or were computed from those of the node's arguments as they are now. Read values by ``value_of`` alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, disable_fake_tensor_cache

_VALUE = "example_value"
_UNKNOWN = "modes_fx_unknown"


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """Return the fake mode in which dynamo traced the graph."""
    for node in graph.nodes:
        value = node.meta.get(_VALUE)
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise ValueError("the graph holds no fake tensor; was it traced by dynamo?")


@contextlib.contextmanager
def under_fake(mode: FakeTensorMode) -> Iterator[None]:
    """Run operations on fake tensors; data-dependent lengths become unbacked sizes that AOT later makes anew."""
    shape_env = mode.shape_env
    ignoring = shape_env.ignore_fresh_unbacked_symbols() if shape_env is not None else contextlib.nullcontext()
    # The cache of fake results never hits on sizes that are new in each graph, and takes as long as computing them.
    with mode, ignoring, torch.no_grad(), disable_fake_tensor_cache(mode):
        yield


def value_of(node: fx.Node) -> Any:
    """Return a node's value; None where dynamo gave it none."""
    complete([node])
    return node.meta.get(_VALUE)


def complete(nodes: Iterable[fx.Node]) -> None:
    """Compute those values of some nodes of one graph that are not known."""
    unknown = [node for node in nodes if _UNKNOWN in node.meta]
    if unknown:
        with under_fake(fake_mode_of(unknown[0].graph)):
            for node in unknown:
                _compute(node)


def set_value(node: fx.Node, value: Any) -> None:
    """Give a node the value that it is known to have."""
    node.meta[_VALUE] = value
    node.meta.pop(_UNKNOWN, None)


def forget(node: fx.Node) -> None:
    """Let a node's value be computed when it is asked for; it is new, or what it depends on has changed."""
    node.meta.pop(_VALUE, None)
    node.meta[_UNKNOWN] = True


def _compute(node: fx.Node) -> Any:
    if _UNKNOWN in node.meta:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), _compute)
        function = node.target if callable(node.target) else getattr(args[0], node.target)
        set_value(node, function(*args, **kwargs) if callable(node.target) else function(*args[1:], **kwargs))
    return node.meta[_VALUE]
