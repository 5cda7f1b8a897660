"""modes-fx: skip the experts of a Mixture-of-Experts vision-language model that do not matter for a token."""

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
