"""Inductor's own hook, by which any ``torch.compile`` of an optimised model skips, and ``generate``'s own compile too."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch._inductor.config as inductor_config
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from modes_fx import graph, kernels, passes, policies
from modes_fx.passes.skip_experts import is_marked, skip_experts
from modes_fx.passes.values import complete
from modes_fx.policies.registry import rules_by_key

logger = logging.getLogger(__name__)


class SkipMarked(CustomGraphPass):
    """Rewrites marked dispatches of dynamo's graph; any other graph stays as it is.

    Args:
        before: The hooks that were set already, which run first.
    """

    def __init__(self, before: Sequence[Any] = ()) -> None:
        self._before = tuple(before)

    def __call__(self, graph: fx.Graph) -> None:
        """Change the graph in place; called by Inductor."""
        for earlier in self._before:
            earlier(graph)
        if not is_marked(graph):
            return
        sites = skip_experts(graph)
        complete(graph.nodes)
        left = [site for site in sites if site.status != "rewritten"]
        if left:
            reasons = "; ".join(f"{site.code}: {site.detail}" for site in left)
            logger.warning("%d of %d marked dispatches compute all pairs: %s", len(left), len(sites), reasons)
        logger.info("graph compiled: %d routing sites rewritten", len(sites) - len(left))

    def uuid(self) -> Any:
        """Return what generated code depends on: the package's passes, kernels and rules, yours among them, and other hooks."""
        own = (_sources(), *((key, _source_of(rule.keep)) for key, rule in rules_by_key().items()))
        others = [earlier.uuid() if isinstance(earlier, CustomGraphPass) else None for earlier in self._before]
        return None if None in others else (own, tuple(others))


def install() -> None:
    """Set the hook behind whatever is set, if it is not; called whenever a marker is traced, which is before Inductor looks."""
    current = inductor_config.pre_grad_custom_pass
    hooks = list(current) if isinstance(current, (list, tuple)) else [current] if current is not None else []
    if not any(isinstance(hook, SkipMarked) for hook in hooks):
        inductor_config.pre_grad_custom_pass = SkipMarked(hooks)


@cache
def _sources() -> str:
    digest = hashlib.sha256()
    for package in (graph, kernels, passes, policies):
        for path in sorted(Path(package.__path__[0]).rglob("*")):
            if path.suffix in (".py", ".cpp"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _source_of(function: Any) -> tuple[str, ...]:
    """Return a function's source, and what else decides what it does: defaults, closure and plain globals."""
    code = getattr(function, "__code__", None)
    if code is None:
        return (repr(function),)
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):  # typed in, or compiled
        source = f"{code.co_code!r} {code.co_consts!r} {code.co_names}"
    values = [function.__defaults__, function.__kwdefaults__, *(cell.cell_contents for cell in function.__closure__ or ())]
    named = [(name, function.__globals__[name]) for name in code.co_names if name in function.__globals__]
    values += [(name, value) for name, value in named if isinstance(value, (bool, int, float, str, tuple))]
    return source, *map(repr, values)
