"""The torch.compile backend: rewrite the routing sites, bind the run-time tensors, call Inductor.

NOTE [what a compiled region is given] Dynamo compiles one graph for all decoder layers (or MoE blocks) and passes each
layer's parameters as inputs. So nothing of one layer is baked in: at every call the layer is told by the identity of the
experts' first weight, and its bounds, with the running forward's token classes, are appended to the inputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch._inductor
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from modes_fx.errors import ModesFxError, NoRoutingSiteError, no_compiler
from modes_fx.passes.skip_experts import Binding, Dispatch, Rewritten, skip_experts
from modes_fx.policies import KeepRule, takes_table

logger = logging.getLogger(__name__)

Compiled = Callable[..., Sequence[Any]]


class Runtime(Protocol):
    """What a backend needs at call time."""

    num_classes: int

    def compiled(self, rewritten: Rewritten) -> None:
        """Take note of a graph that was compiled."""

    def bind(self, binding: Binding, inputs: Sequence[Any]) -> tuple[int, Tensor, Tensor]:
        """Tell a site's layer and tokens from the run-time inputs of its graph.

        Returns:
            The layer's index, the classes of the running forward's tokens (int64 [T]) and the layer's bounds
            (float32 [num_classes]), on the experts' device.
        """

    def table(self, layer: int, binding: Binding, device: torch.device) -> Tensor:
        """Return the rule's table of a layer, float32, on a device; called only for rules that ask for one."""

    def record(self, layer: int, top_k: int, token_class: Tensor, pairs: Tensor) -> None:
        """Count the computed pairs (see ``Rewritten``) of tokens of these classes; called only while ``recording``."""

    @property
    def recording(self) -> bool:
        """Whether dispatched pairs are counted."""


def inductor(module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Compiled:
    """Compile with Inductor.

    Raises:
        CompilerError: No working C++ compiler was found.
    """
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        compiled: Compiled = compile_fx(module, list(inputs), config_patches=options or None)  # type: ignore[assignment]
    except InvalidCxxCompiler as error:
        raise no_compiler(error) from error
    return compiled


def inductor_settings(mode: str | None) -> dict[str, Any]:
    """Return what an Inductor mode, such as ``"max-autotune-no-cudagraphs"``, stands for.

    Raises:
        ModesFxError: There is no such mode.
    """
    known = torch._inductor.list_mode_options()
    if mode is not None and mode not in known:
        raise ModesFxError(f"Unknown mode {mode!r}; Inductor's: {', '.join(known)}.")
    return dict(known[mode]) if mode is not None else {}


class SkipBackend:
    """A torch.compile backend for one runtime; all regions of a model share one instance, and so their graphs.

    Args:
        runtime: Supplies thresholds and token classes at call time.
        rule: Which pairs to keep.
        dispatch: See ``skip_experts``.
        compile_graph: Compiles the rewritten graph.
        require_site: Whether a graph without a rewritten site is an error (its region is known to hold one).
    """

    def __init__(
        self,
        runtime: Runtime,
        rule: KeepRule,
        dispatch: Dispatch,
        compile_graph: Callable[..., Compiled] = inductor,
        *,
        require_site: bool = False,
    ) -> None:
        self._runtime = runtime
        self._rule = rule
        self._dispatch: Dispatch = dispatch
        self._compile = compile_graph
        self._require_site = require_site

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Compiled:
        """Compile dynamo's graph; called by dynamo."""
        _allow_kept_lengths(module)
        rewritten = skip_experts(module, self._rule, self._dispatch, self._runtime.num_classes)
        self._runtime.compiled(rewritten)
        for record in rewritten.records:
            logger.debug("site %s of %s: %s %s %s", record.anchor, record.source, record.status, record.code, record.detail)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("rewritten graph:\n%s", rewritten.module.print_readable(print_output=False))
        if not rewritten.bindings and self._require_site:
            reasons = "; ".join(f"{record.code}: {record.detail}" for record in rewritten.records) or "no dispatch in its graph"
            raise NoRoutingSiteError(f"An MoE region was compiled anew and has no site that can be rewritten ({reasons}).")
        if not rewritten.bindings:
            return self._compile(module, inputs, **options)
        compiled = self._compile(rewritten.module, (*inputs, *rewritten.extra_inputs), **options)
        return _bound(compiled, rewritten, self._runtime, takes_table(self._rule))


def _allow_kept_lengths(module: fx.GraphModule) -> None:
    """Let this one trace hold lengths that depend on data (the number of kept pairs), which only fullgraph traces may."""
    for node in module.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, FakeTensor) and value.fake_mode.shape_env is not None:
            shape_env = value.fake_mode.shape_env
            shape_env.settings = replace(shape_env.settings, allow_dynamic_output_shape_ops=True)
            return


def _bound(compiled: Compiled, rewritten: Rewritten, runtime: Runtime, has_table: bool) -> Compiled:
    bindings = rewritten.bindings

    def run(*inputs: Any) -> Sequence[Any]:
        bound: list[tuple[int, Tensor]] = []
        added: list[Tensor] = []
        for binding in bindings:
            layer, token_class, bounds = runtime.bind(binding, inputs)
            bound.append((layer, token_class))
            added += (token_class, bounds)
            if has_table:
                added.append(runtime.table(layer, binding, bounds.device))
        outputs = compiled(*inputs, *added)
        if runtime.recording:
            counted = zip(bound, bindings, outputs[-len(bindings) :], strict=True)
            for (layer, token_class), binding, pairs in counted:
                runtime.record(layer, binding.top_k, token_class, pairs)
        return outputs[: -len(bindings)]

    return run
