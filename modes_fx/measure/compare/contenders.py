"""Who takes part in a comparison: a keep-rule, what it takes from calibration, and how it is tuned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from modes_fx.calib.search import GAMMAS
from modes_fx.errors import CalibrationError, ModesFxError, PlanError
from modes_fx.measure.compare.statistics import RoutingStatistics
from modes_fx.modality import Phase
from modes_fx.plan import PlanPoint, SkipPlan
from modes_fx.policies import RULES
from modes_fx.policies.batch_threshold import slack_tables
from modes_fx.policies.chance import seed_tables
from modes_fx.policies.oea import open_tables
from modes_fx.policies.sere import primary_tables

Alpha = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Calibrated:
    """What was measured of one model on calibration data.

    Attributes:
        layers: MoE layers, L.
        top_k: K of the layer with the most.
        experts: E of each layer.
        importance: From ``layer_importance``; None if no contender takes it.
        statistics: None if no contender takes them.
        seed: Of what is random.
    """

    layers: int
    top_k: int
    experts: tuple[int, ...] = ()
    importance: Alpha | None = None
    statistics: RoutingStatistics | None = None
    seed: int = 0


@dataclass(frozen=True)
class Contender:
    """One line of the comparison.

    Attributes:
        title: Shown in tables.
        rule: Keep-rule in ``modes_fx.policies.RULES``.
        needs: What of ``Calibrated`` it takes: ``"importance"``, ``"betas"``, ``"ratios"`` or ``"similarity"``.
        gammas: Exponents of the importance among which a pair of thresholds is searched for; () tunes one scale.
        phase: ``"decode"``, ``"prefill"``: it takes part in comparisons of that alone; None: in both.
        primary: S of SERE.
    """

    title: str
    rule: str
    needs: frozenset[str] = frozenset()
    gammas: tuple[float, ...] = ()
    phase: Phase | None = None
    primary: int = 1

    def plan(self, known: Calibrated, scale: float, gamma: float = 1.0) -> SkipPlan:
        """Return the plan of one scale; a larger one skips more."""
        tau = scale
        if self.rule in _OF_LARGEST:
            tau = max(known.top_k - scale, 0.0)
        elif self.rule == "top_p":
            tau = 1 / scale if scale else math.inf
        return SkipPlan((PlanPoint(None, tau, tau, gamma),), self.alpha(known), rule=self.rule, tables=self.tables(known))

    def scales(self, known: Calibrated) -> Sequence[float] | None:
        """Return the only scales that there are: how many of K are not among a token's largest; None if any number is one."""
        return [float(less) for less in range(known.top_k + 1)] if self.rule in _OF_LARGEST else None

    def alpha(self, known: Calibrated) -> Alpha | None:
        """Return what divides each layer's bound: the importance, or 1 / beta."""
        if "importance" in self.needs:
            return known.importance
        statistics = known.statistics
        if statistics is None or not self.needs & {"betas", "ratios"}:
            return None
        betas = statistics.tail_share if "betas" in self.needs else statistics.ratio_to_first
        return tuple((1 / max(beta, 1e-6),) * 2 for beta in betas)

    def tables(self, known: Calibrated) -> tuple[object, ...] | None:
        """Return the rule's tables."""
        if self.rule == "random":
            return seed_tables(known.layers, known.seed)
        if self.rule in _EACH_EXPERT:
            return tuple(table for experts in known.experts for table in _EACH_EXPERT[self.rule](1, experts))
        if "similarity" in self.needs and known.statistics is not None:
            alike = known.statistics.similarity
            return primary_tables(alike, self.primary) if self.rule == "sere" else alike
        if RULES[self.rule].has_table:
            raise PlanError(
                f"The keep-rule {self.rule!r} asks for tables, and a comparison cannot know them. Add a Contender whose "
                "tables() returns them to modes_fx.measure.compare.CONTENDERS."
            )
        return None


_OF_LARGEST = ("reduce_k", "oea")
_EACH_EXPERT: dict[str, Callable[[int, int], tuple[tuple[float, ...], ...]]] = {
    "oea": open_tables,
    "batch_threshold": partial(slack_tables, slack=1.0),
}
"""Tables of one number an expert. At equal experts read, slack is free: it has no expert more read."""

_BETAS, _ALPHA = frozenset({"betas"}), frozenset({"importance"})

CONTENDERS: dict[str, Contender] = {
    "random": Contender("random", "random"),
    "reduce_k": Contender("Reduce-k", "reduce_k"),
    "naee": Contender("NAEE", "naee", _BETAS),
    "naee_top2": Contender("NAEE, ratio", "naee_top2", frozenset({"ratios"})),
    "mc_moe": Contender("MC-MoE", "mc_moe", _BETAS, phase="prefill"),
    "diep": Contender("DiEP", "diep", _BETAS | {"similarity"}),
    "top_p": Contender("top-p", "top_p"),
    "entropy_k": Contender("K by entropy", "entropy_k"),
    "oea": Contender("OEA", "oea", phase="decode"),
    "sere": Contender("SERE, S = 1", "sere", frozenset({"similarity"}), phase="decode"),
    "sere_2": Contender("SERE, S = 2", "sere", frozenset({"similarity"}), phase="decode", primary=2),
    "sere_3": Contender("SERE, S = 3", "sere", frozenset({"similarity"}), phase="decode", primary=3),
    "batch_threshold": Contender("threshold, slack 1", "batch_threshold", phase="decode"),
    "batch_tempered": Contender("tempered, slack 1", "batch_threshold", _ALPHA, GAMMAS, phase="decode"),
    "threshold": Contender("threshold only", "threshold"),
    "gmlg": Contender("GMLG only", "threshold", _ALPHA),
    "dmt": Contender("DMT only", "threshold", gammas=(0.0,), phase="prefill"),
    "modes": Contender("GMLG + DMT", "threshold", _ALPHA, (1.0,), phase="prefill"),
    "tempered": Contender("tempered", "threshold", _ALPHA, GAMMAS),
}

ABLATION = ("threshold", "gmlg", "dmt", "modes", "tempered")
"""The parts of the method: alone, together, and with gamma free."""


def taking_part(phase: Phase) -> tuple[str, ...]:
    """Return the names of all contenders of a phase. Decoded tokens are text: of two thresholds one would do nothing."""
    return tuple(name for name, one in CONTENDERS.items() if one.phase in (None, phase))


def contenders_of(rules: Sequence[str] | None, phase: Phase, *, timed: bool) -> dict[str, Contender]:
    """Return the contenders of these names, of all that take part if there are none, in a comparison of a phase.

    Raises:
        CalibrationError: One has nothing to compare in this phase, or decode steps are to be timed.
        ModesFxError: There is no such rule.
    """
    if phase == "decode" and timed:
        raise CalibrationError("Times are those of prefill and decoding under one plan: compare decode steps without them.")
    found = {name: contender(name) for name in dict.fromkeys(taking_part(phase) if rules is None else rules)}
    if elsewhere := [name for name, one in found.items() if one.phase not in (None, phase)]:
        names = ", ".join(taking_part(phase))
        raise CalibrationError(f"{', '.join(elsewhere)}: nothing to compare in {phase}. Rules that can be: {names}.")
    return found


def own_rule(names: Sequence[str]) -> str:
    """Return which of several rules is looked at closely: the one with most of the method's parts, or else the last."""
    return next((name for name in reversed(ABLATION) if name in names), names[-1])


def contender(name: str) -> Contender:
    """Return a contender by name; a registered keep-rule that is none is tuned by one scale for all layers.

    Raises:
        ModesFxError: There is none of that name.
    """
    if name in CONTENDERS:
        return CONTENDERS[name]
    if name in RULES:
        return Contender(name, name, phase="decode" if RULES[name].decode_only else None)
    raise ModesFxError(f"Unknown rule {name!r}; known: {', '.join(dict.fromkeys((*CONTENDERS, *RULES)))}.")
