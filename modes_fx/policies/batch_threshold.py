"""Thresholds that know of the batch: fewer experts are read for the same number of pairs.

Where few tokens share a call, reading an expert's weights takes longer than computing its pairs. So a pair that alone would not
be worth the reading is computed where its expert is read anyway.

NOTE [why the strongest pair decides, and not the sum] An expert that many tokens want a little may hold as much of the batch's
weight as one that a single token cannot do without: leaving out the experts of the smallest sums of kept weights loses more.
"""

from __future__ import annotations

import math

from torch import Tensor

from modes_fx.errors import PlanError
from modes_fx.policies.batches import read_by
from modes_fx.policies.rule import Rule


def at_least_threshold_or_read_anyway(weights_TK: Tensor, bound_T: Tensor, expert_ids_TK: Tensor, table_E: Tensor) -> Tensor:
    """Keep a pair whose weight reaches its token's threshold, or nearly so if another token's pair has its expert read.

    ::

        read[e]   = any pair of the call with expert e has  weight >= bound
        keep      = weight >= bound  or  (read[expert]  and  weight >= (1 - table[expert]) * bound)

    The table is the slack, in [0, 1]: 0 is plain thresholds, bit by bit; 1 computes all pairs of an expert that is read. Slack
    drops no pair and has no expert more read, so for an equal skip ratio the thresholds rise, and fewer experts are read. A
    token alone in its call is under plain thresholds. Padding, whose bound is infinite, has nothing read and nothing computed.
    What is computed for a token depends on the tokens that share its call.
    """
    bound_T1 = bound_T.unsqueeze(1)
    reached = weights_TK >= bound_T1
    read_E = read_by(reached, expert_ids_TK, table_E.shape[0])
    return reached | (read_E[expert_ids_TK] & (weights_TK >= (1 - table_E[expert_ids_TK]) * bound_T1))


def slack_tables(num_layers: int, num_experts: int, slack: float) -> tuple[tuple[float, ...], ...]:
    """Return the tables of a plan for this rule: one slack for every expert of every layer.

    Raises:
        PlanError: The slack is not in [0, 1].
    """
    if not 0 <= slack <= 1:
        raise PlanError(f"A slack is in [0, 1], from plain thresholds to all pairs of experts that are read; got {slack!r}.")
    return ((float(slack),) * num_experts,) * num_layers


RULE = Rule(at_least_threshold_or_read_anyway, keep_all=0.0, skip_all=math.inf)
