"""Insert torch functions into a dynamo graph, with the ``example_value`` that dynamo would have given them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """Return the fake mode in which dynamo traced the graph."""
    for node in graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise ValueError("the graph holds no fake tensor; was it traced by dynamo?")


def value_of(argument: Any) -> Any:
    """Replace nodes in an argument structure by their example values."""
    return fx.node.map_arg(argument, lambda node: node.meta["example_value"])


@contextlib.contextmanager
def under_fake(mode: FakeTensorMode) -> Iterator[None]:
    """Run operations on fake tensors; data-dependent lengths become unbacked sizes that AOT later makes anew."""
    shape_env = mode.shape_env
    ignoring = shape_env.ignore_fresh_unbacked_symbols() if shape_env is not None else contextlib.nullcontext()
    with mode, ignoring, torch.no_grad():
        yield


class Emitter:
    """Appends calls before a given node and computes their metadata.

    Args:
        before: New nodes go in front of this one.
    """

    @classmethod
    def after(cls, *nodes: fx.Node) -> Emitter:
        """Return an emitter that puts new nodes right behind the last of these."""
        return cls(before=max(nodes, key=list(nodes[0].graph.nodes).index).next)

    def __init__(self, before: fx.Node) -> None:
        self._graph = before.graph
        self._before = before
        self._mode = fake_mode_of(before.graph)

    def trace(self, function: Callable[..., Any], *inputs: fx.Node, **constants: Any) -> tuple[fx.Node, ...]:
        """Insert what ``function(*inputs, **constants)`` does.

        Args:
            function: Takes and returns tensors; traced symbolically, so it must not branch on values.
            inputs: Nodes that stand for its tensor arguments.
            constants: Its other arguments.

        Returns:
            One node for each tensor returned.
        """
        tracer = fx.Tracer()
        tracer.graph = fx.Graph(tracer_cls=fx.Tracer)
        tracer.root = torch.nn.Module()
        proxies = [tracer.create_proxy("placeholder", f"arg{i}", (), {}) for i in range(len(inputs))]
        results = function(*proxies, **constants)
        results = results if isinstance(results, tuple) else (results,)
        placed: dict[fx.Node, fx.Node] = dict(zip((proxy.node for proxy in proxies), inputs, strict=True))
        with self._graph.inserting_before(self._before), under_fake(self._mode):
            for node in tracer.graph.nodes:
                if node.op != "placeholder":
                    placed[node] = self._graph.node_copy(node, placed.__getitem__)
                    refresh(placed[node])
        return tuple(placed[result.node] for result in results)


def refresh(node: fx.Node) -> None:
    """Compute the node's ``example_value`` anew from its arguments; call it inside ``under_fake``."""
    args, kwargs = value_of(node.args), value_of(node.kwargs)
    if callable(node.target):
        node.meta["example_value"] = node.target(*args, **kwargs)
    elif node.op == "call_method":
        node.meta["example_value"] = getattr(args[0], node.target)(*args[1:], **kwargs)


def refresh_dependents(*sources: fx.Node, until: fx.Node) -> None:
    """Compute anew the example values of all that depends on ``sources``, up to and with ``until``."""
    changed = set(sources)
    with under_fake(fake_mode_of(until.graph)):
        for node in until.graph.nodes:
            if node not in changed and any(source in changed for source in node.all_input_nodes):
                refresh(node)
                changed.add(node)
            if node is until:
                return


def erase_dead(candidates: list[fx.Node]) -> None:
    """Erase those candidates that nothing uses any more, users first.

    FX's own dead-code elimination is not used: a dynamo graph holds in-place calls whose result is unused but whose effect
    is not.
    """
    position = {node: index for index, node in enumerate(candidates[0].graph.nodes)}
    for node in sorted(set(candidates), key=position.__getitem__, reverse=True):
        if not node.users and node.op != "placeholder":
            node.graph.erase_node(node)


def erase_unused(nodes: Sequence[fx.Node]) -> None:
    """Erase nodes that an ``Emitter`` put in, from the last ones up, as far as nothing uses them."""
    for node in nodes:
        if not node.users and not node._erased and node.op != "placeholder":
            sources = node.all_input_nodes
            node.graph.erase_node(node)
            erase_unused(sources)
