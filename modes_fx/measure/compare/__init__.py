"""Rules compared at equal skip ratios: each compiled into the model, tuned on calibration data, measured on other data."""

from modes_fx.measure.compare.contenders import CONTENDERS, Calibrated, Contender
from modes_fx.measure.compare.intervals import ratio_interval
from modes_fx.measure.compare.rows import Row, mean_row
from modes_fx.measure.compare.run import TARGETS, Comparison, compare
from modes_fx.measure.compare.statistics import RoutingStatistics, routing_statistics

__all__ = [
    "CONTENDERS",
    "TARGETS",
    "Calibrated",
    "Comparison",
    "Contender",
    "RoutingStatistics",
    "Row",
    "compare",
    "mean_row",
    "ratio_interval",
    "routing_statistics",
]
