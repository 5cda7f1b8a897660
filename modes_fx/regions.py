"""Which modules are compiled, and how: one place for all that touches a module's call.

A *region* is a module that is compiled in place, so that ``generate``, processors and evaluation harnesses go on calling the
same model. ``"moe"``: each MoE block. ``"layer"``: each decoder layer. ``"model"``: each stack of decoder layers.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, Unsupported

from modes_fx.convert import Form, convertible
from modes_fx.errors import ModelError, ModesFxError

Region = Literal["moe", "layer", "model"]

_serial = itertools.count()


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
        self._calls: list[tuple[nn.Module, Any, Any]] = []

    def add(self, modules: list[nn.Module], backend: Callable[..., Any], *, share: bool) -> None:
        """Compile modules in place; ``share`` one cache of graphs among them (they differ by their parameters alone)."""
        caller = compiled_caller(backend)
        for module in modules:
            self._calls.append((module, module._compiled_call_impl, types.MethodType(caller, module)))
            if not share:
                caller = compiled_caller(backend)
        self.resume()

    def suspend(self) -> None:
        """Give each module back the call that it had, until ``resume``."""
        for module, before, _ in self._calls:
            module._compiled_call_impl = before

    def resume(self) -> None:
        """Compile the modules again, with the graphs that they had."""
        for module, _, call in self._calls:
            module._compiled_call_impl = call


def compiled_caller(backend: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``call(module, *args, **kwargs)``, compiled, with a cache of graphs of its own."""

    def call_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    # Which dimensions vary dynamo remembers by file, line and name: another name keeps one model's sizes from another's.
    name = f"call_module_{next(_serial)}"
    own = types.FunctionType(call_module.__code__.replace(co_name=name), call_module.__globals__, name)
    compiled = torch.compile(own, backend=backend, fullgraph=True)

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(module, *args, **kwargs)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, ModesFxError):  # say what is wrong, without dynamo's wrapping
                raise error.inner_exception from None
            raise
        except Unsupported as error:
            raise ModelError(
                f"{type(module).__name__} cannot be traced as one graph, so it cannot be a region: {_first_line(error)} "
                'Use region="moe", which leaves attention and caches alone.'
            ) from error

    return call


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
