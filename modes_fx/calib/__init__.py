"""Calibration: what each layer matters, and which thresholds reach a skip ratio at the least loss."""

from modes_fx.calib.frontier import FrontierPoint, FrontierResult, Violation, frontier_search
from modes_fx.calib.importance import Importance, layer_importance
from modes_fx.calib.objective import Evaluation, Objective
from modes_fx.calib.reference import import_reference
from modes_fx.calib.search import search
from modes_fx.calib.trials import Trial, pareto

__all__ = [
    "Evaluation",
    "FrontierPoint",
    "FrontierResult",
    "Importance",
    "Objective",
    "Trial",
    "Violation",
    "frontier_search",
    "import_reference",
    "layer_importance",
    "pareto",
    "search",
]
