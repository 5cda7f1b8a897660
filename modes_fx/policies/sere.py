"""SERE: in a decode step pairs go from experts that few need to similar ones that are read anyway; fewer experts are read.

Source: arXiv 2602.07616 and its code. Experts that are among the S largest of any token of the step are primary. A pair of any
other expert goes to the primary expert that is most like its own, at its own weight, if the two are alike enough; else its
expert is critical, and read too. No pair is dropped, so that a rule of this kind is judged by the experts read. Adapted: how
much alike is enough is told in units of the layer's mean similarity (the table is DiEP's, linear CKA of what experts compute),
where the paper has one number for all layers. S stands on the table's diagonal, where an expert's likeness to itself is of no
use: 1 as the table is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from modes_fx.errors import PlanError
from modes_fx.policies.batches import read_by
from modes_fx.policies.ranks import ranks
from modes_fx.policies.rule import Rule


def to_most_similar(weights_TK: Tensor, bound_T: Tensor, expert_ids_TK: Tensor, table_EE: Tensor) -> Tensor:
    """Return the expert of each pair, int64 [T, K].

    ::

        P         = experts of the S largest weights of any token,  S = table[0, 0]
        e -> p    iff  e is not in P  and  bound * table[e, p] >= 1,  p the expert of P that is most like e

    So a bound of 0 moves nothing, and the larger, the more moves: it is 1 / the similarity asked for. Padding, whose bound is
    infinite, has no primary expert. What is computed for a token depends on the tokens that share its call.
    """
    largest = (ranks(weights_TK) < table_EE[0, 0]) & (weights_TK > -math.inf)
    primary_E = read_by(largest & (bound_T < math.inf).unsqueeze(1), expert_ids_TK, table_EE.shape[0])[:-1]
    alike_E, nearest_E = torch.where(primary_E, table_EE, 0.0).max(dim=1)
    moves = ~primary_E[expert_ids_TK] & (bound_T.unsqueeze(1) * alike_E[expert_ids_TK] >= 1)
    return torch.where(moves, nearest_E[expert_ids_TK], expert_ids_TK)


def all_but_padding(weights_TK: Tensor, bound_T: Tensor) -> Tensor:
    """Keep every pair under a finite bound."""
    return (bound_T < math.inf).unsqueeze(1) & (weights_TK > -math.inf)


def primary_tables(similarity: Sequence[Sequence[Sequence[float]]], primary: int) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """Return the tables of a plan for this rule.

    Args:
        similarity: E rows of E numbers a layer; see ``modes_fx.measure.compare.RoutingStatistics``.
        primary: S, the number of a token's largest weights whose experts are primary.

    Raises:
        PlanError: ``primary`` is below 1.
    """
    if primary < 1:
        raise PlanError(f"SERE moves pairs to the experts of each token's largest weights, 1 or more of them; got {primary!r}.")
    return tuple(
        tuple(tuple(float(primary) if e == p else value for p, value in enumerate(row)) for e, row in enumerate(table))
        for table in similarity
    )


RULE = Rule(all_but_padding, keep_all=0.0, skip_all=math.inf, reroute=to_most_similar, decode_only=True)
