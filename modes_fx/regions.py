"""Which modules are compiled, and how: one place for all that touches a module's call.

A *region* is a module that is compiled in place, so that ``generate``, processors and evaluation harnesses go on calling the
same model. ``"moe"``: each MoE block. ``"layer"``: each decoder layer. ``"model"``: each stack of decoder layers.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._dynamo.decorators import skip
from torch._dynamo.exc import BackendCompilerFailed, Unsupported, UserError
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from modes_fx.convert import Form, convertible
from modes_fx.errors import ModelError, ModesFxError
from modes_fx.experts import call_as_region, run_alone, stock_dispatch

Region = Literal["moe", "layer", "model"]

_serial = itertools.count()
_SMALLER_REGION = 'Use region="moe", which leaves attention and caches alone.'
_HOOKS_CAME_LATER = "accelerate's hooks were added after optimize(): call modes_fx.optimize() again."
_QUANTISED_LATER = "If its weights were quantised after optimize(): call modes_fx.optimize() again."
_REASON = "modes_fx compiles this region itself"
_running: ContextVar[nn.Module | None] = ContextVar("modes_fx_region", default=None)


def running_region() -> nn.Module | None:
    """Return the region that runs compiled in this context, or None outside any."""
    return _running.get()


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer.

    Attributes:
        name: Path of the experts module.
        experts: The module whose ``forward(hidden_TH, ids_TK, weights_TK)`` dispatches.
        block: The module around router and experts, or ``experts`` itself where the model has none.
        layer: The decoder layer.
        stack: The module that holds the list of decoder layers.
        form: How the block can be converted, where its experts do not use transformers' dispatch; None once it is.
        stands_for: The model's own block in whose place ``block`` runs once it is converted, else None.
    """

    name: str
    experts: nn.Module
    block: nn.Module
    layer: nn.Module
    stack: nn.Module
    form: Form | None = None
    stands_for: nn.Module | None = None

    @property
    def place(self) -> nn.Module:
        """The model's own module that is called."""
        return self.block if self.stands_for is None else self.stands_for

    def region(self, region: Region) -> nn.Module:
        """Return the module to compile for a region."""
        return {"moe": self.block, "layer": self.layer, "model": self.stack}[region]

    @property
    def hidden_size(self) -> int:
        """Width of the rows that the experts take, H."""
        weight = next(iter(self.experts.parameters()))  # [E, 2I, H], or [E, H, 2I] where transposed
        return weight.shape[-2] if getattr(self.experts, "is_transposed", False) else weight.shape[-1]


def find_moe_layers(model: nn.Module) -> list[MoeLayer]:
    """Return the model's MoE layers, in module order: those that use transformers' dispatch, and those that do not."""
    modules = dict(model.named_modules())
    found = []
    for own_name, own in modules.items():
        form, name, module = None, own_name, own
        # What the decorator of transformers' experts interface leaves on every module that it serves.
        if not all(hasattr(module, mark) for mark in ("has_gate", "is_transposed", "_apply_gate")):
            candidate = convertible(own)
            if candidate is None:
                continue
            form, name = candidate[0], f"{own_name}.{candidate[1]}".lstrip(".")
            module = modules[name]
        parents = [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)]
        listed = next((i for i, parent in enumerate(parents) if _in_list(parent, modules)), None)
        block = parents[0] if parents and listed != 0 else name  # experts right under the decoder layer: no block between
        layer = parents[listed] if listed is not None else block
        stack = parents[listed + 2] if listed is not None and listed + 2 < len(parents) else ""
        found.append(MoeLayer(name, module, modules[block] if form is None else own, modules[layer], modules[stack], form))
    return found


def _in_list(name: str, modules: dict[str, nn.Module]) -> bool:
    return "." in name and isinstance(modules[name.rsplit(".", 1)[0]], nn.ModuleList)


class CompiledRegions:
    """Modules compiled in place, each as one graph.

    NOTE [a code object of its own] Dynamo keeps its compiled graphs by code object, and ``Module.compile`` shares one, that
    of ``Module._call_impl``, among all modules of the process: graphs of unrelated models would be tried one after the other
    and would use up each other's recompile limit. Regions of one model share a copy made for them alone.
    """

    def __init__(self) -> None:
        self._before: list[tuple[nn.Module, Any]] = []
        self._alone: list[tuple[nn.Module, Any]] = []
        self._suspended = False

    def add(self, modules: list[nn.Module], backend: Callable[..., Any], dynamic: bool | None, *, share: bool) -> None:
        """Compile modules in place; ``share`` one cache of graphs among them (they differ by their parameters alone)."""
        caller = compiled_caller(backend, dynamic=dynamic)
        for module in modules:
            before = module._compiled_call_impl
            self._before.append((module, before))
            module._compiled_call_impl = functools.partial(self._call, caller, before, module)
            if not share:
                caller = compiled_caller(backend, dynamic=dynamic)

    def add_alone(self, experts: list[nn.Module], backend: Callable[..., Any], dynamic: bool | None) -> None:
        """Compile experts modules for calls that pass the regions around them by; see ``modes_fx.experts``."""
        call = compiled_caller(backend, stock_dispatch, dynamic=dynamic)
        self._alone += [(module, call) for module in experts]
        self.resume()

    @skip  # a torch.compile around the model begins below this call
    def _call(self, compiled: Callable[..., Any], before: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._suspended:
            return (before or module._call_impl)(*args, **kwargs)
        return compiled(module, *args, **kwargs)

    def suspend(self) -> None:
        """Let each module run as it did before, until ``resume``; what stands in front of its call stays there."""
        self._suspended = True
        for experts, _ in self._alone:
            run_alone(experts, None)

    def resume(self) -> None:
        """Let the modules run compiled again, with the graphs that they had."""
        self._suspended = False
        for experts, call in self._alone:
            run_alone(experts, call)

    def remove(self) -> None:
        """Give each module back the call that it had, for good."""
        self.suspend()
        for module, before in self._before:
            module._compiled_call_impl = before


def _call_region(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return call_as_region(module, args, kwargs)


def compiled_caller(
    backend: Callable[..., Any], function: Callable[..., Any] = _call_region, *, dynamic: bool | None = None
) -> Callable[..., Any]:
    """Return ``function(module, *args, **kwargs)``, compiled, with a cache of graphs of its own."""

    def call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(module, *args, **kwargs)

    # Which dimensions vary dynamo remembers by file, line and name: another name keeps one model's sizes from another's.
    name = f"call_module_{next(_serial)}"
    code = call_module.__code__.replace(co_name=name)
    own = types.FunctionType(code, call_module.__globals__, name, None, call_module.__closure__)
    compiled = torch.compile(own, backend=backend, fullgraph=True, dynamic=dynamic)

    @torch._dynamo.disable(reason=_REASON)  # type: ignore[untyped-decorator]  # a trace around would take in stock code
    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        outside = _running.set(module)
        try:
            return compiled(module, *args, **kwargs)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, ModesFxError):  # say what is wrong, without dynamo's wrapping
                raise error.inner_exception from None
            raise
        except (Unsupported, UserError, GuardOnDataDependentSymNode) as error:
            raise ModelError(
                f"{type(module).__name__} cannot be traced as one graph, so it cannot be a region: {_first_line(error)} "
                + _advice(module)
            ) from error
        finally:
            _running.reset(outside)

    return call  # type: ignore[no-any-return]


def has_accelerate_hooks(module: nn.Module) -> bool:
    """Return whether accelerate moves weights inside a module when it is called (offloading, several devices)."""
    return any(hasattr(part, "_hf_hook") for part in module.modules())


def has_torchao_weights(module: nn.Module) -> bool:
    """Return whether torchao quantised some of a module's weights."""
    return any(type(parameter).__module__.startswith("torchao") for parameter in module.parameters())


def _advice(module: nn.Module) -> str:
    if has_accelerate_hooks(module):
        return _HOOKS_CAME_LATER
    return _QUANTISED_LATER if has_torchao_weights(module) else _SMALLER_REGION


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
