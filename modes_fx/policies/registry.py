"""The keep-rules by name, as plans name them."""

from __future__ import annotations

from modes_fx.errors import ModesFxError
from modes_fx.policies import batch_threshold, chance, diep, mc_moe, naee, naee_top2, reduce_k, threshold
from modes_fx.policies.rule import Rule

RULES: dict[str, Rule] = {
    "threshold": threshold.RULE,
    "batch_threshold": batch_threshold.RULE,
    "reduce_k": reduce_k.RULE,
    "naee": naee.RULE,
    "naee_top2": naee_top2.RULE,
    "mc_moe": mc_moe.RULE,
    "diep": diep.RULE,
    "random": chance.RULE,
}


def register(name: str, rule: Rule) -> Rule:
    """Make a rule of your own known by name, before a plan that names it is made or loaded.

    Args:
        name: Its name in plans.
        rule: The rule. Registering one again under its name replaces it; models optimised with the old one keep that.

    Returns:
        The rule.

    Raises:
        ModesFxError: The name is one of the package's own.
    """
    if name in _OWN:
        raise ModesFxError(f"The keep-rule {name!r} is modes-fx's own. Register yours under another name.")
    RULES[name] = rule
    return rule


_OWN = frozenset(RULES)
