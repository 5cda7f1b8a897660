"""Keep-rules: which of a token's top-k experts are computed. One file a rule; ``register`` adds yours.

A rule sees tensors and returns tensors; a plan names it and holds its bounds (and its table, if it has one). See
``modes_fx.policies.rule`` for what a rule may ask for, and ``examples/custom_policy.py``.
"""

from modes_fx.policies.registry import RULES, key_of, register, rule_of
from modes_fx.policies.rule import KeepRule, Reroute, Rule, decide, rerouted

__all__ = ["RULES", "KeepRule", "Reroute", "Rule", "decide", "key_of", "register", "rerouted", "rule_of"]
