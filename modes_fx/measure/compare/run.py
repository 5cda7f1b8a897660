"""Rules x targets -> rows, on one model: calibrate once, tune each rule to each target, measure it on other data."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, get_args

from torch import nn

from modes_fx.attach.protection import why_unobserved
from modes_fx.calib import processes
from modes_fx.calib.importance import Importance
from modes_fx.calib.importance_journal import resumable_importance
from modes_fx.calib.journal import Journal
from modes_fx.calib.objective import Answers, Evaluation, checked
from modes_fx.calib.search import search
from modes_fx.calib.trials import Trial, short_hash
from modes_fx.data.batch import Batch
from modes_fx.errors import CalibrationError, UnreachableError
from modes_fx.files.importance_fields import Mode
from modes_fx.measure.compare.contenders import Alpha, Calibrated, Contender, contenders_of, own_rule
from modes_fx.measure.compare.decoding import DecodeObjective
from modes_fx.measure.compare.measurements import Measurements, records_of
from modes_fx.measure.compare.row_speeds import RowSpeeds
from modes_fx.measure.compare.rows import Row, measured
from modes_fx.measure.compare.samples import SampleObjective, SampleScores
from modes_fx.measure.compare.statistics import RoutingStatistics, routing_statistics
from modes_fx.measure.compare.tuning import Tuned, Tuner
from modes_fx.modality import Phase
from modes_fx.models.layers import find_moe_layers
from modes_fx.optimize import is_optimized, optimize, report, restore
from modes_fx.plan import PlanPoint, SkipPlan
from modes_fx.policies import RULES

logger = logging.getLogger(__name__)

TARGETS = (0.5, 0.67, 0.75, 0.83, 0.88)


class Progress(Protocol):
    """Receives the steps of the long parts."""

    def __call__(self, part: str, done: int, total: int | None) -> None:
        """Take note that ``done`` of ``total`` steps of a part are finished; None while the total is unknown."""


@dataclass(frozen=True)
class Comparison:
    """All rules on one model.

    Attributes:
        unskipped: Its own metrics on test data: ``score``.
        samples: Of test data.
        rows: By rule, then target.
        timing: Where speed was timed, in what: the fastest settings of stock transformers and of modes-fx in each phase, all
            that were timed, and the prompts; see ``Stopwatch.facts``.
        own: The rule that is looked at closely; see ``own_rule``.
        layers: Paths of the experts modules of the MoE layers.
        alpha: Importance of each layer for (text, vision) tokens; None where no rule takes it.
        trials: By rule that pairs of thresholds were searched for: all that were measured on calibration data.
        phase: What was compared; see ``compare``.
    """

    unskipped: dict[str, float]
    samples: int
    rows: tuple[Row, ...]
    timing: Mapping[str, Any] = field(default_factory=dict)
    own: str = ""
    layers: tuple[str, ...] = ()
    alpha: Alpha | None = None
    trials: Mapping[str, tuple[Mapping[str, float], ...]] = field(default_factory=dict)
    phase: Phase = "prefill"


def compare(
    model: nn.Module,
    calibration: Iterable[Batch],
    test: Iterable[Batch],
    targets: Sequence[float] = TARGETS,
    rules: Sequence[str] | None = None,
    *,
    phase: Phase = "prefill",
    importance_mode: Mode = "reference",
    grid_size: int = 24,
    tolerance: float = 0.005,
    seed: int = 0,
    timed: bool = False,
    journal: str | os.PathLike[str] | None = None,
    look: Callable[[nn.Module, SkipPlan], None] | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare rules at equal skip ratios, each compiled into the model and really skipping.

    Each is tuned on ``calibration`` to skip at least the target and at most ``tolerance`` more, where it can; ``test`` is only
    measured. One process alone.

    Args:
        model: A model that ``modes_fx.optimize`` takes, not optimised; left so.
        calibration: See ``Objective``.
        test: Other data, likewise.
        targets: Skip ratios in [0, 1].
        rules: Names of contenders (``CONTENDERS``), or of registered keep-rules; None takes all of the phase that the model
            can run.
        phase: ``"prefill"``: prompt and answer in one forward, at equal shares of pairs skipped. ``"decode"``: answers decoded
            step by step behind prompts that keep all, at equal shares of the distinct experts that the unskipped model reads
            and the rule does not (``DecodeObjective``).
        importance_mode: See ``layer_importance``.
        grid_size: Of the search for pairs of thresholds; see ``search``.
        tolerance: See above.
        seed: Of the bootstrap and the random rule.
        timed: Whether to time each row against stock transformers, each in its fastest setting; in prefill comparisons.
        journal: File that each measurement is written to as it is made, and read from: a comparison that was cut off goes on
            where it stopped. It may serve several models and sets of data, each of which finds its own.
        look: Called with the optimised model, and the plan of ``own_rule`` at the largest target that it reaches; in prefill
            comparisons, whose plans hold for whole answers.
        progress: Told of each step.

    Raises:
        CalibrationError: Unusable data, an argument out of range, several processes, a journal of another kind, or a rule that
            observes attention where that cannot be.
        ModesFxError: An unknown rule, or the model cannot be optimised.
    """
    if phase not in get_args(Phase):
        raise CalibrationError(f"Unknown phase {phase!r}; known: {', '.join(get_args(Phase))}.")
    chosen = contenders_of(rules, phase, timed=timed)
    if processes.world() > 1:
        raise CalibrationError("A comparison runs as one process. Start it without torchrun or accelerate launch.")
    if is_optimized(model):
        raise CalibrationError("The model is optimised already. Call modes_fx.restore(model) first.")
    if not chosen or not targets or not all(0 <= target <= 1 for target in targets):
        raise CalibrationError(f"A comparison needs a rule, and targets in [0, 1]; got {list(chosen)} and {list(targets)}.")
    if importance_mode not in get_args(Mode):
        raise CalibrationError(f"Unknown mode {importance_mode!r} of the importance; known: {', '.join(get_args(Mode))}.")
    if grid_size < 2 or not tolerance >= 0:
        raise CalibrationError(f"A comparison needs grid_size >= 2 and tolerance >= 0; got {grid_size} and {tolerance}.")
    chosen = _that_run(model, chosen, named=rules is not None)
    tune, held = _usable("calibration", calibration), _usable("test", test)
    records = records_of(model, tune, held, journal)
    if phase == "decode":
        records = records.under("decode")
    match = _Match(model, tune, held, sorted(set(targets)), grid_size, tolerance, seed, records, progress)
    match.phase = phase
    match.own, match.look = own_rule(list(chosen)), look if phase == "prefill" else None
    if timed:
        match.speeds = RowSpeeds(model, held[0], records, match.step)
    try:
        known = match.calibrate(chosen.values(), importance_mode)
        rows: dict[str, list[Row]] = {}
        for rule in dict.fromkeys(one.rule for one in chosen.values()):  # one compilation for all that share a keep-rule
            rows |= match.play(rule, {name: one for name, one in chosen.items() if one.rule == rule}, known)
    finally:
        if is_optimized(model):
            restore(model)
    assert match.unskipped is not None
    correct = match.unskipped.correct_S
    score, everything = float(correct.double().mean()), tuple(row for name in chosen for row in rows[name])
    timing = match.speeds.facts if match.speeds else {}
    return Comparison(
        {"score": score}, len(correct), everything, timing, match.own, match.layers, known.importance, match.trials, phase
    )


def _that_run(model: nn.Module, chosen: Mapping[str, Contender], *, named: bool) -> dict[str, Contender]:
    """Return the contenders that a model can run; one that was asked for by name is never left out."""
    layers, protecting = find_moe_layers(model), [name for name, one in chosen.items() if RULES[one.rule].protects]
    reason = why_unobserved(layers) if layers and protecting else ""
    if not reason:
        return dict(chosen)
    if named:
        raise CalibrationError(f"{', '.join(protecting)}: {reason}")
    logger.warning("left out: %s. %s", ", ".join(protecting), reason)
    return {name: one for name, one in chosen.items() if name not in protecting}


def _usable(name: str, batches: Iterable[Batch]) -> list[Batch]:
    try:
        found = checked(batches)
    except CalibrationError as error:
        raise CalibrationError(f"The {name} data cannot be used. {error}") from error
    if not found:
        raise CalibrationError(
            f"There are no {name} data: a comparison needs at least one batch to tune on and one to measure on."
        )
    return found


class _Match:
    """One model, its data, and what all rules share."""

    def __init__(
        self, model: nn.Module, calibration: list[Batch], test: list[Batch], targets: list[float], grid_size: int,
        tolerance: float, seed: int, records: Journal, progress: Progress | None,
    ) -> None:  # fmt: skip
        self.model, self.calibration, self.test, self.targets = model, calibration, test, targets
        self.grid_size, self.tolerance, self.seed = grid_size, tolerance, seed
        self.records = records
        self._tell = progress or (lambda part, done, total: None)
        self.speeds: RowSpeeds | None = None
        self.unskipped: SampleScores | None = None
        self.own = ""
        self.phase: Phase = "prefill"
        self.look: Callable[[nn.Module, SkipPlan], None] | None = None
        self.layers: tuple[str, ...] = ()
        self.trials: dict[str, tuple[Mapping[str, float], ...]] = {}

    def calibrate(self, chosen: Iterable[Contender], mode: Mode) -> Calibrated:
        needs = frozenset[str]().union(*(one.needs for one in chosen))
        optimize(self.model)
        answers = Answers(self.model)
        for batch in self.calibration:  # sites whose router was not traced learn K when they run
            if all(site.top_k for site in report(self.model).rewritten):
                break
            answers(batch)
        sites = report(self.model).sites
        self.layers = tuple(site.name for site in sites)
        alpha = statistics = None
        if "importance" in needs:
            step = self.step("importance of each layer")
            alpha = resumable_importance(self.model, self.calibration, mode, journal=self.records, on_step=step).alpha
        if needs & {"betas", "ratios", "similarity"}:
            statistics = self._statistics("similarity" in needs)
        experts = tuple(site.num_experts for site in sites)
        return Calibrated(len(sites), max(site.top_k for site in sites), experts, alpha, statistics, self.seed)

    def _statistics(self, similarity: bool) -> RoutingStatistics:
        key = ("statistics", int(similarity))
        known = self.records.get(key, RoutingStatistics)
        if known is not None:
            return known
        self._tell("statistics of the routing", 0, 1)
        found = routing_statistics(self.model, self.calibration, similarity=similarity)
        self.records.add(key, asdict(found))
        self._tell("statistics of the routing", 1, 1)
        return found

    def play(self, rule: str, chosen: dict[str, Contender], known: Calibrated) -> dict[str, list[Row]]:
        """Tune and measure all contenders of one keep-rule."""
        logger.info("tuning %s to %d targets, and measuring", ", ".join(chosen), len(self.targets))
        optimize(self.model, next(iter(chosen.values())).plan(known, 0.0))
        objective = DecodeObjective if self.phase == "decode" else SampleObjective
        data = Measurements(self.model, self.calibration, self.test, known.layers, self.records, objective)
        if self.unskipped is None:
            self.unskipped = data.on_test("", None)
        rows: dict[str, list[Row]] = {name: [] for name in chosen}
        plans: list[tuple[str, int, SkipPlan]] = []
        total = len(chosen) * len(self.targets)
        for name, one in chosen.items():
            best: SkipPlan | None = None
            for target, (tuned, plan, largest) in zip(self.targets, self._tune(name, one, data, known), strict=True):
                if plan is not None:
                    plans.append((name, len(rows[name]), plan))
                rows[name].append(self._row(name, one, target, tuned, plan, largest, data))
                best = plan or best
                self._tell(f"compare: {rule}", sum(map(len, rows.values())), total)
            if name == self.own and self.look is not None and best is not None:
                self.look(self.model, best)
        if self.speeds is not None:
            self.speeds.write_into(rows, plans, rule)
        return rows

    def _tune(
        self, name: str, one: Contender, data: Measurements, known: Calibrated
    ) -> list[tuple[Tuned | None, SkipPlan | None, float]]:
        if not one.gammas:
            tuner = Tuner(
                lambda scale: data.on_calibration(name, one.plan(known, scale)),
                tolerance=self.tolerance,
                scales=one.scales(known),
            )
            found = [tuner.reach(target) for target in self.targets]
            return [(tuned, one.plan(known, tuned.scale) if tuned else None, tuner.largest_ratio) for tuned in found]
        if self.phase == "decode":
            return self._tune_gammas(name, one, data, known)
        plans, largest = self._search(name, one, known)
        results: list[tuple[Tuned | None, SkipPlan | None, float]] = []
        for target in self.targets:
            point = plans.get(target)
            if point is None:
                results.append((None, None, largest))
                continue

            def scaled(scale: float, point: PlanPoint = point) -> SkipPlan:
                taus = {"tau_text": point.tau_text * scale, "tau_vision": point.tau_vision * scale}
                return SkipPlan((replace(point, target=None, realised={}, kl={}, **taus),), known.importance)

            def measure(scale: float, scaled: Any = scaled) -> Evaluation:
                return data.on_calibration(name, scaled(scale))

            # A grid overshoots its target by up to one step: scaled down to the target like every rival.
            tuner = Tuner(measure, tolerance=self.tolerance, largest=1.0)
            tuned = tuner.reach(target)
            results.append((tuned, scaled(tuned.scale) if tuned else None, tuner.largest_ratio))
        return results

    def _tune_gammas(
        self, name: str, one: Contender, data: Measurements, known: Calibrated
    ) -> list[tuple[Tuned | None, SkipPlan | None, float]]:
        """Tune one threshold, since all tokens are text, under each gamma; take that of least loss on calibration data."""

        def tuner_of(gamma: float) -> Tuner:
            return Tuner(lambda scale: data.on_calibration(name, one.plan(known, scale, gamma)), tolerance=self.tolerance)

        tuners = {gamma: tuner_of(gamma) for gamma in one.gammas}
        results: list[tuple[Tuned | None, SkipPlan | None, float]] = []
        for target in self.targets:
            found = {gamma: tuned for gamma, tuner in tuners.items() if (tuned := tuner.reach(target))}
            largest = max(tuner.largest_ratio for tuner in tuners.values())
            # One that overshoots pays for what nobody asked for, unless all do.
            gamma = min(found, key=lambda gamma: (not found[gamma].reached, found[gamma].evaluation.kl), default=None)
            if gamma is None:
                results.append((None, None, largest))
            else:
                results.append((found[gamma], one.plan(known, found[gamma].scale, gamma), largest))
        return results

    def _search(self, name: str, one: Contender, known: Calibrated) -> tuple[dict[float, PlanPoint], float]:
        """Return the pairs found, by target, and the largest skip ratio seen on the way."""
        alpha = known.importance or ((1 / known.layers,) * 2,) * known.layers  # DMT leaves it out: gamma is 0
        importance = Importance(alpha, alpha, "reference", 0)
        # Searches of one importance share what they measure.
        records = self.records.under("search", short_hash(json.dumps(alpha).encode()))
        seen: list[Trial] = []
        try:
            plan = search(
                self.model, self.calibration, importance, self.targets, gammas=one.gammas, grid_size=self.grid_size,
                journal=records, on_trial=seen.append, on_progress=self.step("search for pairs of thresholds"),
            )  # fmt: skip
            points = {point.target: point for point in plan.points if point.target is not None}
        except UnreachableError:
            points = {}  # which the rows say
        self.trials[name] = tuple(trial.flat() for trial in seen)
        return points, max((trial.evaluation.skip_ratio for trial in seen), default=0.0)

    def _row(
        self, name: str, one: Contender, target: float, tuned: Tuned | None, plan: SkipPlan | None, largest: float,
        data: Measurements,
    ) -> Row:  # fmt: skip
        if tuned is None or plan is None:
            return Row(name, one.title, target, "unreachable", largest)
        assert self.unskipped is not None
        scores = data.on_test(name, plan)
        metrics, intervals = measured(scores, self.unskipped, self.seed)
        skipped = {"calibration": tuned.evaluation.skip_ratio, **scores.skip_ratio}
        if self.phase == "prefill":
            skipped["prefill"] = skipped["all"]
        point = {key: value for key, value in asdict(plan.points[0]).items() if key.startswith("tau") or key == "gamma"}
        status = "reached" if tuned.reached else "overshot"
        return Row(name, one.title, target, status, largest, skipped, metrics, intervals, point=point)

    def step(self, part: str) -> Any:
        return lambda done, total: self._tell(part, done, total)
