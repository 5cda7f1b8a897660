"""Insert torch functions into a dynamo graph, and take nodes out of it; ``values`` tells what new nodes hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from modes_fx.passes.values import forget


class Emitter:
    """Appends calls before a given node.

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
        with self._graph.inserting_before(self._before):
            for node in tracer.graph.nodes:
                if node.op != "placeholder":
                    placed[node] = self._graph.node_copy(node, placed.__getitem__)
                    forget(placed[node])
        return tuple(placed[result.node] for result in results)


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
