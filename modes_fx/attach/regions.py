"""What ``optimize`` compiles by itself, for models that are called from Python: each MoE block, or wider modules, in place.

Wider regions are compiled as anybody would compile those modules. One graph of MoE blocks serves all layers: what their markers
take is handed in, and which pairs they kept is handed out. Experts that are called apart from their block (it has hooks, or
cannot be traced) are compiled the same way. A trace around the model takes none of this in: it sees the modules' own code.
"""

from __future__ import annotations

import inspect
import logging
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._dynamo.decorators import skip
from torch._dynamo.eval_frame import remove_from_cache
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit, Unsupported, UserError
from torch._logging._internal import warning_once
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from modes_fx.errors import ModelError, ModesFxError
from modes_fx.graph.backend import last_sites
from modes_fx.graph.code import own_code
from modes_fx.graph.experts import of_one_layer
from modes_fx.graph.running import traced
from modes_fx.graph.runtime import Runtime
from modes_fx.models.layers import has_accelerate_hooks

logger = logging.getLogger(__name__)

_SMALLER_REGION = 'Use region="moe", which leaves attention and caches alone.'
_HOOKS_CAME_LATER = "accelerate's hooks were added after optimize(): call modes_fx.optimize() again."
_CHANGED_LATER = "If it was quantised or given adapters after optimize(): call modes_fx.optimize() again."
_REASON = "modes_fx compiles this module itself"
_CAPTURED = ("output_hidden_states", "output_attentions", "output_router_logits")

Compiled = Callable[..., Any]


class Regions:
    """Modules compiled in place.

    Args:
        runtime: The model's.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._regions: list[Region] = []

    def add_block(self, layer: int, block: nn.Module, compiled: Compiled) -> None:
        """Compile a module that holds one layer's dispatch, by ``compiled_block``; several share it."""
        self._regions.append(_Block(self._runtime, layer, block, compiled))

    def add(self, module: nn.Module, compiled: Compiled) -> None:
        """Compile a module that holds any number of layers, by ``compiled_module``."""
        self._regions.append(_Wider(self._runtime, module, compiled))

    def remove(self) -> None:
        """Give each module back the call that it had."""
        for region in reversed(self._regions):
            region.remove()
        self._regions.clear()


class Region:
    """Stands where ``Module.compile`` puts compiled code, from the time that it is made.

    Args:
        runtime: The model's.
        module: The module.
    """

    def __init__(self, runtime: Runtime, module: nn.Module) -> None:
        self._runtime = runtime
        self._module = module
        self._before = module._compiled_call_impl
        module._compiled_call_impl = self
        self._told = False
        # A hook may do what no trace can follow, as those by which transformers captures router logits and hidden states.
        self._hooks = [hooks for part in module.modules() for hooks in (part._forward_hooks, part._forward_pre_hooks)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module: as it is in a trace, else compiled."""
        if traced():
            return self._module._call_impl(*args, **kwargs)
        return self.run_compiled(args, kwargs)

    @skip  # what runs below is kept from outer traces by itself, without another wrapper in each call
    def run_compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module compiled, unless something is to see its parts run."""
        watched = self.is_watched(kwargs)
        if watched and not self._told:
            self._told = True
            logger.info("a %s runs uncompiled but for its experts: hooks see its parts run", type(self._module).__name__)
        if watched or self._runtime.suspended or self._runtime.switched:
            return (self._before or self._module._call_impl)(*args, **kwargs)
        return self.run(args, kwargs)

    def remove(self) -> None:
        """Give the module the call that it had."""
        self._module._compiled_call_impl = self._before

    def is_watched(self, kwargs: dict[str, Any]) -> bool:
        """Return whether something is to see the module's parts run in a call with these arguments."""
        return any(self._hooks)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module compiled."""
        raise NotImplementedError


class _Block(Region):
    def __init__(self, runtime: Runtime, layer: int, module: nn.Module, compiled: Compiled) -> None:
        super().__init__(runtime, module)
        self._call = OneLayer(runtime, layer, compiled)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._call(self._module, *args, **kwargs)


class _Wider(Region):
    def __init__(self, runtime: Runtime, module: nn.Module, compiled: Compiled) -> None:
        super().__init__(runtime, module)
        self._compiled = compiled
        self._config = getattr(module, "config", None)

    def is_watched(self, kwargs: dict[str, Any]) -> bool:
        # transformers adds the hooks that capture these in the middle of the first call that asks for them
        return super().is_watched(kwargs) or any(kwargs.get(name, getattr(self._config, name, False)) for name in _CAPTURED)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._compiled(self._module, *args, **kwargs)


class OneLayer:
    """Calls compiled code that holds one dispatch: gives it what the marker takes, and notes what was kept.

    Args:
        runtime: The model's.
        layer: The layer's index.
        compiled: See ``compiled_block``.
        decided: Whether the pairs were decided before, so that there is nothing to give and nothing to note.
    """

    def __init__(self, runtime: Runtime, layer: int, compiled: Compiled, *, decided: bool = False) -> None:
        self._runtime = runtime
        self._layer = layer
        self._decided = decided
        self._hidden_size = runtime.layers[layer].hidden_size
        self._compiled = compiled

    @torch._dynamo.disable(reason=_REASON)  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the module on its arguments, of which the first tensor holds the hidden states of all tokens, in any shape."""
        if self._decided:
            output, _ = self._compiled(module, (), *args, **kwargs)
            self._runtime.sites.update((self._layer, site) for site in last_sites()[:1])
            return output
        hidden: Tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        given = self._runtime.given(self._layer, hidden.numel() // self._hidden_size, hidden.device)
        output, kept = self._compiled(module, given, *args, **kwargs)
        if kept is not None:
            self._runtime.sites[self._layer] = last_sites()[0]
            if (forward := self._runtime.running()) is not None:
                forward.note(self._layer, given[0], *kept)
        return output


def _own_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module._call_impl(*args, **kwargs)


def compiled_block(
    backend: Callable[..., Any], function: Callable[..., Any] = _own_call, *, dynamic: bool | None = None
) -> Compiled:
    """Return ``function(module, *args, **kwargs)``, compiled as what holds one layer's dispatch: see ``OneLayer``.

    It is called with what the marker takes after the module, and returns the pairs kept beside the result.
    """

    def call(module: nn.Module, given: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            _passed_over(module, sys._getframe().f_code)
            return function(module, *args, **kwargs), None
        return of_one_layer(function, given, (module, *args), kwargs)

    return _compiled(call, backend, dynamic, advice=_CHANGED_LATER)


def compiled_module(backend: Callable[..., Any], *, dynamic: bool | None = None) -> Compiled:
    """Return a module's own call, compiled: ``compiled(module, *args, **kwargs)``."""

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            _passed_over(module, sys._getframe().f_code)
        return _own_call(module, *args, **kwargs)

    return _compiled(call, backend, dynamic, advice=_SMALLER_REGION)


def _passed_over(module: nn.Module, code: types.CodeType) -> None:
    """Say once that a call ran uncompiled, and see that dynamo looks at the function again.

    NOTE [a call that dynamo passes over] It runs the call as it is written, which gives the same answer, and leaves the code
    alone for good. Settings ask for that; in a process of several threads it was seen once without, in a soak (torch 2.13).
    ``torch.compile(fullgraph=True)`` raises afterwards ("found no compiled frames"), when caches have taken the call in.
    """
    warning_once(
        logger, "%s ran uncompiled, since dynamo passed a call over: same answer, but skipped experts were computed",
        type(module).__name__,
    )  # fmt: skip
    set_code_exec_strategy(code, _FrameExecStrategy(_FrameAction.DEFAULT, _FrameAction.DEFAULT))


class _Graphs:
    """A function of a module compiled as one graph, with a cache of graphs of its own, which goes when this goes."""

    def __init__(self, call: Callable[..., Any], backend: Callable[..., Any], dynamic: bool | None) -> None:
        own = own_code(call)
        whole: Any = torch._dynamo.optimize(backend, nopython=True, dynamic=dynamic, **_LIMIT)
        whole.fullgraph = False  # see NOTE [a call that dynamo passes over]
        self.run = whole(own)
        # Graphs hang on the code, unseen by the garbage collector, and lead back to it.
        weakref.finalize(self, remove_from_cache, own.__code__).atexit = False


_LIMIT: Any = {"recompile_limit": 64} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}
"""A module that is called from Python has twelve graphs by itself (one sequence or several, of one token or several, with
gradients, without, in inference mode), where torch's own limit is eight."""


def _compiled(call: Callable[..., Any], backend: Callable[..., Any], dynamic: bool | None, *, advice: str) -> Compiled:
    """Return a function of a module, compiled as one graph for each kind of call.

    NOTE [threads make graphs anew] Guards are not safe from other threads (pytorch/pytorch#118260): now and then one fails
    that holds, and the same graph is made again. A server's threads so come to any limit, at which torch raises: then all
    begins anew.
    """
    graphs, lock = _Graphs(call, backend, dynamic), threading.Lock()

    @skip
    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal graphs
        while True:
            mine = graphs
            try:
                return mine.run(module, *args, **kwargs)
            except FailOnRecompileLimitHit:
                with lock:
                    if graphs is mine:
                        logger.info("%s: as many graphs as torch keeps; they are made anew", type(module).__name__)
                        graphs = _Graphs(call, backend, dynamic)
            except BackendCompilerFailed as error:
                if isinstance(error.inner_exception, ModesFxError):  # say what is wrong, without dynamo's wrapping
                    raise error.inner_exception from None
                raise
            except (Unsupported, UserError, GuardOnDataDependentSymNode) as error:
                raise ModelError(
                    f"{type(module).__name__} cannot be traced as one graph, so it cannot be a region: {_first_line(error)} "
                    + (_HOOKS_CAME_LATER if has_accelerate_hooks(module) else advice)
                ) from error

    return run


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
