"""modes-fx: skip the experts of a Mixture-of-Experts vision-language model that do not matter for a token.

What an optimised model does where:

- called from Python, ``generate`` with any cache: skips, each MoE block compiled in place;
- inside a ``torch.compile`` (Inductor, ``backend="modes_fx"``), ``generate``'s own for a static cache too: skips, in one graph;
- under other backends, tracers, ``torch.export`` and AOTInductor: the same answers, with nothing spared.
"""

from modes_fx.errors import ModesFxError
from modes_fx.inspection import Inspection, inspect
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
__version__ = "0.1.0"
