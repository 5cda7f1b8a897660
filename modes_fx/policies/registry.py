"""The keep-rules by name, as plans name them."""

from __future__ import annotations

from modes_fx.errors import ModesFxError
from modes_fx.policies import (
    batch_threshold,
    chance,
    diep,
    entropy_k,
    mc_moe,
    naee,
    naee_top2,
    oea,
    reduce_k,
    sere,
    threshold,
    top_p,
)
from modes_fx.policies.rule import Rule

RULES: dict[str, Rule] = {
    "threshold": threshold.RULE,
    "batch_threshold": batch_threshold.RULE,
    "reduce_k": reduce_k.RULE,
    "naee": naee.RULE,
    "naee_top2": naee_top2.RULE,
    "mc_moe": mc_moe.RULE,
    "diep": diep.RULE,
    "top_p": top_p.RULE,
    "entropy_k": entropy_k.RULE,
    "oea": oea.RULE,
    "sere": sere.RULE,
    "random": chance.RULE,
}


_KEYS = dict(RULES)
"""Every rule that there ever was, by the key under which graphs name it: one registered again gets another key."""


def rules_by_key() -> dict[str, Rule]:
    """Return all rules that graphs may name, those that were replaced among them."""
    return dict(_KEYS)


def key_of(name: str) -> str:
    """Return the key of the rule that a name stands for now."""
    return next(key for key in reversed(_KEYS) if key.partition("#")[0] == name)


def rule_of(key: str) -> Rule:
    """Return the rule that a graph names.

    Raises:
        ModesFxError: There is none: the graph was made where somebody registered a rule of their own.
    """
    if key not in _KEYS:
        raise ModesFxError(f"This graph keeps experts by the rule {key!r}: call modes_fx.policies.register() for it first.")
    return _KEYS[key]


def register(name: str, rule: Rule) -> Rule:
    """Make a rule of your own known by name, before a plan that names it is made or loaded.

    Args:
        name: Its name in plans; without ``#``.
        rule: The rule. Registering one again under its name replaces it; models optimised with the old one keep that.

    Returns:
        The rule.

    Raises:
        ModesFxError: The name is one of the package's own, or none.
    """
    if name in _OWN:
        raise ModesFxError(f"The keep-rule {name!r} is modes-fx's own. Register yours under another name.")
    if not name or "#" in name:
        raise ModesFxError(f"A keep-rule's name is not empty and holds no '#', got {name!r}.")
    versions = sum(key.partition("#")[0] == name for key in _KEYS)
    _KEYS[f"{name}#{versions + 1}" if versions else name] = rule
    RULES[name] = rule
    return rule


_OWN = frozenset(RULES)
