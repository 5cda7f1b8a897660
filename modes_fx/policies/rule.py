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

Reroute = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``reroute(weights_TK, bound_T, expert_ids_TK, table) -> expert_ids_TK``: other experts for pairs, before any is dropped.

``table`` goes by one of the names above, which says its shape. An expert may come up twice among those of a token.
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
        reroute: Hands pairs to other experts before ``keep`` decides, which then is asked about those; None moves none.
        decode_only: Whether prefills keep all pairs, since the rule is about the few tokens of a decode step.

    Raises:
        ModesFxError: ``keep`` or ``reroute`` asks for what there is not.
    """

    keep: KeepRule
    keep_all: float
    skip_all: float
    protects: bool = False
    reroute: Reroute | None = None
    decode_only: bool = False

    def __post_init__(self) -> None:
        known = {_EXPERT_IDS, *_TABLES}
        asked = _asked(self.keep)
        if not set(asked) <= known or len(self._tables) > 1:
            raise ModesFxError(
                f"A keep-rule takes weights_TK, bound_T and, if it wants, expert_ids_TK and one of {', '.join(_TABLES)}; "
                f"this one asks for {', '.join(asked)}."
            )
        moved = () if self.reroute is None else _asked(self.reroute)
        if self.reroute is not None and (moved[:1] != (_EXPERT_IDS,) or moved[1:] not in {(name,) for name in _TABLES}):
            raise ModesFxError(
                f"A rule re-routes by weights_TK, bound_T, expert_ids_TK and one of {', '.join(_TABLES)}, in this order; "
                f"this one asks for {', '.join(moved)}."
            )

    @property
    def has_table(self) -> bool:
        """Whether it needs the plan's tables."""
        return bool(self._tables)

    def table_shape(self, num_experts: int) -> tuple[int, ...]:
        """Return the shape of the table that it needs, in a layer of so many experts."""
        (name,) = self._tables
        return _TABLES[name](num_experts)

    @property
    def _tables(self) -> set[str]:
        asked = {*_asked(self.keep), *(_asked(self.reroute) if self.reroute else ())}
        return asked & set(_TABLES)


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


def rerouted(
    rule: Rule,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    token_class: Tensor,
    bounds: Tensor,
    table: Tensor | None = None,
) -> Tensor:
    """Return the experts of all pairs, int64 [T, K], as a rule re-routes them; for arguments see ``decide``.

    It is traced as it stands, in front of the marker: plain operations on ids, of which no pass knows.
    """
    if rule.reroute is None:
        return expert_ids_TK
    assert table is not None, "a rule that re-routes has a table"
    return rule.reroute(weights_TK.float(), bounds[token_class], expert_ids_TK, table)


def _asked(rule: Callable[..., object]) -> tuple[str, ...]:
    return tuple(inspect.signature(rule).parameters)[2:]
