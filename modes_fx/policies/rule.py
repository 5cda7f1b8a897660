"""What a keep-rule is, and how the pass applies one.

A rule is a plain function of tensors that is traced into the graph, before the dispatch, where Inductor fuses it. Its bounds,
and its table if it has one, come in as tensors at call time, so that changing them never recompiles.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from modes_fx.errors import ModesFxError

Decision = Tensor | tuple[Tensor, Tensor]
KeepRule = Callable[..., Decision]
"""``rule(weights_TK, bound_T, ...) -> keep_TK``: float32 [T, K] and float32 [T] to bool [T, K].

A weight of minus infinity marks a pair that has no expert: no rule keeps it, whatever the bound. A rule asks for more by naming
a parameter after these two:

- ``expert_ids_TK``: int64 [T, K], the expert of each pair.
- ``table_EE``, ``table_E`` or ``table_1``: the layer's own numbers from the plan, float32 [E, E], [E] or [1].

It may return ``(keep_TK, weights_TK)`` to put other weights, float32 [T, K], in the place of the dispatched ones.
"""

_EXPERT_IDS = "expert_ids_TK"
_TABLES: dict[str, Callable[[int], tuple[int, ...]]] = {
    "table_EE": lambda experts: (experts, experts),
    "table_E": lambda experts: (experts,),
    "table_1": lambda experts: (1,),
}


@dataclass(frozen=True)
class Rule:
    """A keep-rule and the bounds at its two ends.

    Attributes:
        keep: Decides the pairs.
        keep_all: A bound that keeps every pair.
        skip_all: A bound that skips every pair, for padding.
        protects: Whether the tokens that matter most to later ones keep all pairs in prefill (``modes_fx.attach.protection``).

    Raises:
        ModesFxError: ``keep`` asks for what there is not.
    """

    keep: KeepRule
    keep_all: float
    skip_all: float
    protects: bool = False

    def __post_init__(self) -> None:
        known = {_EXPERT_IDS, *_TABLES}
        asked = _asked(self.keep)
        if not set(asked) <= known or sum(name in _TABLES for name in asked) > 1:
            raise ModesFxError(
                f"A keep-rule takes weights_TK, bound_T and, if it wants, expert_ids_TK and one of {', '.join(_TABLES)}; "
                f"this one asks for {', '.join(asked)}."
            )

    @property
    def has_table(self) -> bool:
        """Whether it needs the plan's tables."""
        return takes_table(self.keep)


def takes_table(rule: KeepRule) -> bool:
    """Return whether a rule asks for a table."""
    return any(name in _TABLES for name in _asked(rule))


def table_shape(rule: KeepRule, num_experts: int) -> tuple[int, ...]:
    """Return the shape of the table that a rule asks for, in a layer of so many experts."""
    return next(_TABLES[name](num_experts) for name in _asked(rule) if name in _TABLES)


def decide(
    rule: KeepRule,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    token_class: Tensor,
    bounds: Tensor,
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Apply a rule to dispatched weights, in float32 whatever their dtype: thresholds are never rounded.

    Args:
        rule: The rule.
        expert_ids_TK: int64 [T, K].
        weights_TK: [T, K].
        token_class: int64 [T].
        bounds: float32 [number of classes].
        table: The layer's, if the rule asks for one.

    Returns:
        bool [T, K]; and weights [T, K] to put in place of ``weights_TK``, or None to leave them.
    """
    asked = _asked(rule)
    given = {name: table for name in asked if name in _TABLES}
    if _EXPERT_IDS in asked:
        given[_EXPERT_IDS] = expert_ids_TK
    decision = rule(weights_TK.float(), bounds[token_class], **given)
    if not isinstance(decision, tuple):
        return decision, None
    keep_TK, new_TK = decision
    return keep_TK, new_TK.type_as(weights_TK)


def _asked(rule: KeepRule) -> tuple[str, ...]:
    return tuple(inspect.signature(rule).parameters)[2:]
