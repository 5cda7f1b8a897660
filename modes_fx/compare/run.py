"""Rules x targets -> rows, on one model: calibrate once, tune each rule to each target, measure it on other data."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from modes_fx.calib import processes
from modes_fx.calib.importance import Importance, Mode, layer_importance
from modes_fx.calib.objective import Batch, Evaluation, Objective
from modes_fx.calib.search import search
from modes_fx.calib.trials import Trial
from modes_fx.compare.contenders import CONTENDERS, Alpha, Calibrated, Contender, contender, own_rule
from modes_fx.compare.rows import Row, measured
from modes_fx.compare.samples import SampleObjective, SampleScores
from modes_fx.compare.speed import Stopwatch
from modes_fx.compare.statistics import routing_statistics
from modes_fx.compare.tuning import Tuned, Tuner
from modes_fx.errors import CalibrationError
from modes_fx.optimize import is_optimized, optimize, report, restore, set_plan
from modes_fx.plan import PlanPoint, SkipPlan

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
        own: The rule that is looked at closely; see ``own_rule``.
        layers: Paths of the experts modules of the MoE layers.
        alpha: Importance of each layer for (text, vision) tokens; None where no rule takes it.
        trials: By rule that pairs of thresholds were searched for: all that were measured on calibration data.
    """

    unskipped: dict[str, float]
    samples: int
    rows: tuple[Row, ...]
    own: str = ""
    layers: tuple[str, ...] = ()
    alpha: Alpha | None = None
    trials: Mapping[str, tuple[Mapping[str, float], ...]] = field(default_factory=dict)


def compare(
    model: nn.Module,
    calibration: Iterable[Batch],
    test: Iterable[Batch],
    targets: Sequence[float] = TARGETS,
    rules: Sequence[str] = tuple(CONTENDERS),
    *,
    importance_mode: Mode = "reference",
    grid_size: int = 24,
    tolerance: float = 0.005,
    seed: int = 0,
    timed: bool = False,
    look: Callable[[nn.Module, SkipPlan, Row], None] | None = None,
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
        rules: Names of contenders (``CONTENDERS``), or of registered keep-rules.
        importance_mode: See ``layer_importance``.
        grid_size: Of the search for pairs of thresholds; see ``search``.
        tolerance: See above.
        seed: Of the bootstrap and the random rule.
        timed: Whether to time each row against stock.
        look: Called with the optimised model, and the plan and the row of ``own_rule`` at the largest target that it reaches.
        progress: Told of each step.

    Raises:
        CalibrationError: Unusable data, a target outside of [0, 1], or several processes.
        ModesFxError: An unknown rule, or the model cannot be optimised.
    """
    chosen = {name: contender(name) for name in dict.fromkeys(rules)}
    if processes.world() > 1:
        raise CalibrationError("A comparison runs as one process. Start it without torchrun or accelerate launch.")
    if is_optimized(model):
        raise CalibrationError("The model is optimised already. Call modes_fx.restore(model) first.")
    if not chosen or not targets or not all(0 <= target <= 1 for target in targets):
        raise CalibrationError(f"A comparison needs a rule, and targets in [0, 1]; got {list(rules)} and {list(targets)}.")
    match = _Match(model, list(calibration), list(test), sorted(set(targets)), grid_size, tolerance, seed, progress)
    match.own, match.look = own_rule(list(chosen)), look
    match.stopwatch = Stopwatch(model, match.test[0]) if timed else None
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
    return Comparison(
        {"score": float(correct.double().mean())}, len(correct), tuple(row for name in chosen for row in rows[name]),
        match.own, match.layers, known.importance, match.trials,
    )  # fmt: skip


class _Match:
    """One model, its data, and what all rules share."""

    def __init__(
        self, model: nn.Module, calibration: list[Batch], test: list[Batch], targets: list[float], grid_size: int,
        tolerance: float, seed: int, progress: Progress | None,
    ) -> None:  # fmt: skip
        self.model, self.calibration, self.test, self.targets = model, calibration, test, targets
        self.grid_size, self.tolerance, self.seed = grid_size, tolerance, seed
        self._tell = progress or (lambda part, done, total: None)
        self.stopwatch: Stopwatch | None = None
        self.unskipped: SampleScores | None = None
        self.own = ""
        self.look: Callable[[nn.Module, SkipPlan, Row], None] | None = None
        self.layers: tuple[str, ...] = ()
        self.trials: dict[str, tuple[Mapping[str, float], ...]] = {}

    def calibrate(self, chosen: Iterable[Contender], mode: Mode) -> Calibrated:
        needs = frozenset[str]().union(*(one.needs for one in chosen))
        optimize(self.model)
        sites = report(self.model).sites
        self.layers = tuple(site.name for site in sites)
        alpha = statistics = None
        if "importance" in needs:
            step = self._step("importance of each layer")
            alpha = layer_importance(self.model, self.calibration, mode, on_step=step).alpha
        if needs & {"betas", "ratios", "similarity"}:
            self._tell("statistics of the routing", 0, 1)
            statistics = routing_statistics(self.model, self.calibration, similarity="similarity" in needs)
            self._tell("statistics of the routing", 1, 1)
        return Calibrated(len(sites), max(site.top_k for site in sites), alpha, statistics, self.seed)

    def play(self, rule: str, chosen: dict[str, Contender], known: Calibrated) -> dict[str, list[Row]]:
        """Tune and measure all contenders of one keep-rule."""
        optimize(self.model, next(iter(chosen.values())).plan(known, 0.0))
        objective, test = Objective(self.model, self.calibration), SampleObjective(self.model, self.test)
        if self.unskipped is None:
            self.unskipped = test.scores(None)
        rows: dict[str, list[Row]] = {name: [] for name in chosen}
        total = len(chosen) * len(self.targets)
        with tempfile.TemporaryDirectory() as folder:  # searches of one rule share what they measure
            for name, one in chosen.items():
                best: tuple[SkipPlan, Row] | None = None
                for target, (tuned, plan, largest) in zip(
                    self.targets, self._tune(name, one, objective, known, Path(folder) / "journal"), strict=True
                ):
                    rows[name].append(row := self._row(name, one, target, tuned, plan, largest, test))
                    best = best if plan is None else (plan, row)
                    self._tell(f"compare: {rule}", sum(map(len, rows.values())), total)
                if name == self.own and self.look is not None and best is not None:
                    self.look(self.model, *best)
        return rows

    def _tune(
        self, name: str, one: Contender, objective: Objective, known: Calibrated, journal: Path
    ) -> list[tuple[Tuned | None, SkipPlan | None, float]]:
        layers = known.layers
        if not one.gammas:
            tuner = Tuner(
                lambda scale: objective.evaluate(one.plan(known, scale).bounds(layers)),
                tolerance=self.tolerance,
                scales=one.scales(known),
            )
            found = [tuner.reach(target) for target in self.targets]
            return [(tuned, one.plan(known, tuned.scale) if tuned else None, tuner.largest_ratio) for tuned in found]
        plans = self._search(name, one, known, journal)
        results: list[tuple[Tuned | None, SkipPlan | None, float]] = []
        for target in self.targets:
            point = plans.get(target)
            if point is None:
                results.append((None, None, 1.0))
                continue

            def scaled(scale: float, point: PlanPoint = point) -> SkipPlan:
                taus = {"tau_text": point.tau_text * scale, "tau_vision": point.tau_vision * scale}
                return SkipPlan((replace(point, target=None, realised={}, kl={}, **taus),), known.importance)

            def measure(scale: float, scaled: Any = scaled) -> Evaluation:
                return objective.evaluate(scaled(scale).bounds(layers))

            # A grid overshoots its target by up to one step: scaled down to the target like every rival.
            tuner = Tuner(measure, tolerance=self.tolerance, largest=1.0)
            tuned = tuner.reach(target)
            results.append((tuned, scaled(tuned.scale) if tuned else None, tuner.largest_ratio))
        return results

    def _search(self, name: str, one: Contender, known: Calibrated, journal: Path) -> dict[float, PlanPoint]:
        alpha = known.importance or ((1 / known.layers,) * 2,) * known.layers  # DMT leaves it out: gamma is 0
        importance = Importance(alpha, alpha, "reference", 0)
        step = self._step("search for pairs of thresholds")
        trials: list[Trial] = []
        try:
            plan = search(
                self.model, self.calibration, importance, self.targets, gammas=one.gammas, grid_size=self.grid_size,
                journal=journal, on_trial=trials.append, on_progress=step,
            )  # fmt: skip
        except CalibrationError:  # no target can be reached, which the rows say
            return {}
        self.trials[name] = tuple(trial.flat() for trial in trials)
        return {point.target: point for point in plan.points if point.target is not None}

    def _row(
        self, name: str, one: Contender, target: float, tuned: Tuned | None, plan: SkipPlan | None, largest: float,
        test: SampleObjective,
    ) -> Row:  # fmt: skip
        if tuned is None or plan is None:
            return Row(name, one.title, target, "unreachable", largest)
        assert self.unskipped is not None
        scores = test.scores(plan.bounds(test.num_layers))
        metrics, intervals = measured(scores, self.unskipped, self.seed)
        skipped = {"calibration": tuned.evaluation.skip_ratio, **scores.skip_ratio, "prefill": scores.skip_ratio["all"]}
        speed: dict[str, float] = {}
        if self.stopwatch is not None:
            set_plan(self.model, plan)
            speed, phases = self.stopwatch(self.model)
            if not math.isnan(phases["decode"]):
                skipped["decode"] = phases["decode"]
        point = {key: value for key, value in asdict(plan.points[0]).items() if key.startswith("tau") or key == "gamma"}
        status = "reached" if tuned.reached else "overshot"
        return Row(name, one.title, target, status, largest, skipped, metrics, intervals, speed, point)

    def _step(self, part: str) -> Any:
        return lambda done, total: self._tell(part, done, total)
