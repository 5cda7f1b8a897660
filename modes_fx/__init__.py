"""modes-fx: skip the experts of a Mixture-of-Experts vision-language model that do not matter for a token.

What an optimised model does where:

- called from Python, ``generate`` with any cache: skips, each MoE block compiled in place;
- inside a ``torch.compile`` (Inductor, ``backend="modes_fx"``), ``generate``'s own for a static cache too: skips, in one graph;
- under other backends, tracers, ``torch.export`` and AOTInductor: the same answers, with nothing spared.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modes_fx.errors import ModesFxError
    from modes_fx.measure.inspection import Inspection, inspect
    from modes_fx.modality import token_modality
    from modes_fx.optimize import optimize, report, restore, set_plan, stats
    from modes_fx.plan import SkipPlan
    from modes_fx.report import GraphReport

__all__ = [
    "GraphReport",
    "Inspection",
    "ModesFxError",
    "SkipPlan",
    "inspect",
    "optimize",
    "report",
    "restore",
    "set_plan",
    "stats",
    "token_modality",
]
__version__ = "0.2.0"

_MODULES = {
    "GraphReport": "report",
    "Inspection": "measure.inspection",
    "ModesFxError": "errors",
    "SkipPlan": "plan",
    "inspect": "measure.inspection",
    "token_modality": "modality",
    **dict.fromkeys(("optimize", "report", "restore", "set_plan", "stats"), "optimize"),
}


class _Package(ModuleType):
    """A package whose functions keep their names from the submodules called alike, which importing these would put there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: what it needs takes seconds."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_the_command() -> bool:
    """Say whether this process was started as ``modes-fx`` or ``python -m modes_fx``, which answer ``--help`` without torch."""
    program = next(iter(sys.argv), "")
    return Path(program).stem == "modes-fx" or (program == "-m" and __name__ in sys.orig_argv)


sys.modules[__name__].__class__ = _Package
if not _is_the_command():  # programs that hold our operations need no more than this import
    importlib.import_module("modes_fx.graph.marker")
    importlib.import_module("modes_fx.kernels.cpu.ops")
