"""Plans: which thresholds reach which skip ratio, by layer and modality, and budgets that steer them as a prefill goes."""

from modes_fx.plan.skip_plan import PlanPoint, SkipPlan, config_hash, describe_model

__all__ = ["PlanPoint", "SkipPlan", "config_hash", "describe_model"]
