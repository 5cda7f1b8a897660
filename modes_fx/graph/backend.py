"""The torch.compile backend of regions: rewrite the marked dispatches of dynamo's graph, then call Inductor."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch._inductor
import torch._inductor.config as inductor_config
from torch import fx

from modes_fx.errors import ModesFxError, NoRoutingSiteError, no_compiler
from modes_fx.passes.site import SiteRecord
from modes_fx.passes.skip_experts import skip_experts
from modes_fx.passes.values import complete

logger = logging.getLogger(__name__)

Compiled = Callable[..., Sequence[Any]]


class _Last(threading.local):
    sites: tuple[SiteRecord, ...] = ()


_last = _Last()


def last_sites() -> tuple[SiteRecord, ...]:
    """Return the sites of the graph of a ``SkipBackend`` that this thread ran last."""
    return _last.sites


def inductor(module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Compiled:
    """Compile with Inductor.

    Raises:
        CompilerError: No working C++ compiler was found.
    """
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.exc import InvalidCxxCompiler

    complete(module.graph.nodes)  # Inductor caches graphs whose nodes have values, and its fusions look at them
    try:
        compiled: Compiled = compile_fx(module, list(inputs), config_patches=options or None)  # type: ignore[assignment]
    except InvalidCxxCompiler as error:
        raise no_compiler(error) from error
    return compiled


def inductor_settings(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an Inductor mode, such as ``"max-autotune-no-cudagraphs"``, stands for, with settings that go before it.

    Raises:
        ModesFxError: There is no such mode or setting.
    """
    known = torch._inductor.list_mode_options()
    if mode is not None and mode not in known:
        raise ModesFxError(f"Unknown mode {mode!r}; Inductor's: {', '.join(known)}.")
    unknown = sorted(options.keys() - torch._inductor.list_options())
    if unknown:
        raise ModesFxError(f"Unknown option {unknown[0]!r}; Inductor's: torch._inductor.list_options().")
    return {**(known[mode] if mode is not None else {}), **options}


class SkipBackend:
    """A torch.compile backend for the regions of one model, which share their graphs by it.

    Args:
        compiled: Told of each graph's sites.
        compile_graph: Compiles the rewritten graph.
        settings: Inductor's.
        require_site: Whether a marked dispatch that stays as it was is an error.
    """

    def __init__(
        self,
        compiled: Callable[[tuple[SiteRecord, ...]], None],
        compile_graph: Callable[..., Compiled] = inductor,
        *,
        require_site: bool = False,
        **settings: Any,
    ) -> None:
        self._compiled = compiled
        self._compile = compile_graph
        self._require_site = require_site
        self._settings = settings

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        """Compile dynamo's graph; called by dynamo."""
        sites = rewrite(module, **self._settings)
        self._compiled(sites)
        left = [site for site in sites if site.status != "rewritten"]
        if self._require_site and left:
            reasons = "; ".join(f"{site.code}: {site.detail}" for site in left)
            raise NoRoutingSiteError(f"An MoE region was compiled anew and has a site that cannot be rewritten ({reasons}).")
        logger.info("compiling a graph of %d operations, %d of them routing sites", len(module.graph.nodes), len(sites))
        compiled = self._compile(module, inputs, **self._settings)
        if not sites:
            return compiled

        def run(*inputs: Any) -> Sequence[Any]:
            outputs = compiled(*inputs)
            _last.sites = sites
            return outputs

        return run


def rewrite(module: fx.GraphModule, **settings: Any) -> tuple[SiteRecord, ...]:
    """Run the pass on dynamo's graph, in place, under Inductor's settings, and log what became of each marked dispatch."""
    with inductor_config.patch(settings):
        sites = skip_experts(module.graph)
    module.recompile()
    for site in sites:
        logger.debug("site %s of %s: %s %s %s", site.anchor, site.source, site.status, site.code, site.detail)
    if sites and logger.isEnabledFor(logging.DEBUG):
        logger.debug("rewritten graph:\n%s", module.print_readable(print_output=False))
    return sites
