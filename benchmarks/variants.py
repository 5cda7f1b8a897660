"""Would the rule lose less in another form? Tempered thresholds beside three variants of theirs, on a trained model.

    python benchmarks/variants.py MODEL --data A --test-data B [--targets 0.5 0.75 0.875] [--grid-size 14] [--journal FILE]
        [--forms ...]

- equal steps: thresholds are searched for on a grid whose steps skip equal shares of the unskipped scores.
- gammas apart: the exponent of the importance is searched for text and for vision tokens each, 16 pairs instead of 4.
- taking over: the weights that a token keeps are scaled to the sum of all of its (as in NAEE), under the thresholds found for
  the rule itself, scaled until they skip as much.

All are tuned on A and measured on B: KL in nats an answer token, with its 95% interval over samples (paired bootstrap). FILE
keeps each measurement, so that a run that was cut off goes on; it may serve several models.
"""

import argparse
import importlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from tabulate import tabulate

import modes_fx
from modes_fx.calib import Importance
from modes_fx.calib.importance_journal import resumable_importance
from modes_fx.calib.search import CROWDING, GAMMAS, search
from modes_fx.calib.trials import short_hash
from modes_fx.data import load_samples, make_batches
from modes_fx.measure.compare.measurements import Measurements, records_of
from modes_fx.measure.compare.rows import measured
from modes_fx.measure.compare.tuning import Tuner
from modes_fx.models.loading import load
from modes_fx.plan import PlanPoint, SkipPlan
from modes_fx.policies import Rule, register
from modes_fx.policies.survivors import taking_over
from modes_fx.policies.threshold import RULE, at_least_threshold

Gammas = tuple[float, float]
FORMS = ("equal steps", "gammas apart", "taking over")
search_module = importlib.import_module("modes_fx.calib.search")  # the package has the function by this name


def taken_over(weights_TK: Any, bound_T: Any) -> Any:
    """Keep what the thresholds keep, and hand it the weights of what they drop."""
    keep_TK = at_least_threshold(weights_TK, bound_T)
    return keep_TK, taking_over(keep_TK, weights_TK)


class Variants:
    """Plans of one model and what they lose.

    Args:
        options: Of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        """Load model and data, and measure the importance of its layers."""
        self.targets, self.grid_size = sorted(options.targets), options.grid_size
        self.model, processor = load(options.model, dtype="float32")
        sizes = (options.data, options.samples), (options.test_data, options.test_samples)
        self.tune, self.held = (
            list(make_batches(load_samples(path, limit=size), processor, options.batch_size)) for path, size in sizes
        )
        self.records = records_of(self.model, self.tune, self.held, options.journal)
        modes_fx.optimize(self.model)
        self.alpha = resumable_importance(self.model, self.tune, "reference", journal=self.records).alpha
        self.unskipped = self._measurements().on_test("", None)

    def searched(self, crowding: float = CROWDING) -> dict[float, tuple[Gammas, SkipPlan]]:
        """Return, for each target, the exponents that ``search`` chooses, and the plan."""
        importance = Importance(self.alpha, self.alpha, "reference", 0)
        records = self.records.under("search", short_hash(json.dumps([self.alpha, crowding]).encode()))
        with patch.object(search_module, "CROWDING", crowding):
            found = search(self.model, self.tune, importance, self.targets, grid_size=self.grid_size, journal=records)
        return {
            point.target: ((point.gamma, point.gamma), SkipPlan((replace(point, target=None),), self.alpha))
            for point in found.points
            if point.target is not None
        }

    def searched_apart(self, pairs: Sequence[Gammas]) -> dict[float, tuple[Gammas, SkipPlan]]:
        """Return, for each target, the exponents of least loss and the plan found for them; its own exponent is 1."""
        best: dict[float, tuple[float, Gammas, SkipPlan]] = {}
        for gammas in pairs:
            powers = tuple((text ** gammas[0], vision ** gammas[1]) for text, vision in self.alpha)
            importance = Importance(powers, powers, "reference", 0)
            records = self.records.under("search", short_hash(json.dumps(powers).encode()))
            found = search(
                self.model, self.tune, importance, self.targets, gammas=(1.0,), grid_size=self.grid_size, journal=records
            )
            for point in found.points:
                loss = point.kl["calibration"]
                if point.target is not None and loss < best.get(point.target, (math.inf,))[0]:
                    best[point.target] = loss, gammas, SkipPlan((replace(point, target=None),), powers)
        return {target: (gammas, plan) for target, (_, gammas, plan) in best.items()}

    def rows(self, name: str, found: dict[float, tuple[Gammas, SkipPlan]], rule: str = "threshold") -> Iterator[list[str]]:
        """Scale the plans to their targets under a rule, and yield one row each of what they do to the test data."""
        modes_fx.restore(self.model)
        modes_fx.optimize(self.model, SkipPlan((PlanPoint(None, 0.0, 0.0),), self.alpha, rule=rule))
        data = self._measurements()
        for target, (gammas, plan) in sorted(found.items()):
            (point,) = plan.points

            def scaled(scale: float, point: PlanPoint = point, plan: SkipPlan = plan) -> SkipPlan:
                taus = {"tau_text": point.tau_text * scale, "tau_vision": point.tau_vision * scale}
                return SkipPlan((replace(point, realised={}, kl={}, **taus),), plan.alpha, rule=rule)

            tuned = Tuner(lambda scale, scaled=scaled: data.on_calibration(name, scaled(scale))).reach(target)
            if tuned is None:
                yield [name, f"{target:.1%}", "", "", "not reached", ""]
                continue
            scores = data.on_test(name, scaled(tuned.scale))
            metrics, intervals = measured(scores, self.unskipped, 0)
            low, high = intervals["kl"]
            test = f"{metrics['kl']:.2e} ({low:.1e} to {high:.1e})"
            exponents = ", ".join(f"{gamma:g}" for gamma in dict.fromkeys(gammas))
            yield [
                name, f"{target:.1%}", exponents, f"{tuned.evaluation.kl:.2e}", test, f"{scores.skip_ratio['all']:.1%}",
            ]  # fmt: skip

    def _measurements(self) -> Measurements:
        layers = len(modes_fx.report(self.model).sites)
        return Measurements(self.model, self.tune, self.held, layers, self.records)


def main() -> None:
    """Search, measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="demo, a folder or a hub id")
    parser.add_argument("--data", required=True, help="samples to calibrate on")
    parser.add_argument("--test-data", required=True, help="samples to measure on")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--test-samples", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--targets", nargs="+", type=float, default=[0.5, 0.75, 0.875])
    parser.add_argument("--grid-size", type=int, default=14)
    parser.add_argument("--journal", help="file that keeps each measurement")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="beside tempered; all if left out")
    options = parser.parse_args()
    register("taking_over", Rule(taken_over, RULE.keep_all, RULE.skip_all))
    variants = Variants(options)
    same = variants.searched()
    table = [*variants.rows("tempered", same)]
    if "equal steps" in options.forms:
        table += variants.rows("equal steps", variants.searched(crowding=1.0))
    if "gammas apart" in options.forms:
        table += variants.rows("gammas apart", variants.searched_apart(list(itertools.product(GAMMAS, repeat=2))))
    if "taking over" in options.forms:
        table += variants.rows("taking over", same, "taking_over")
    heads = ["rule", "target", "gamma (text, vision)", "KL, calibration", "KL, test", "skipped, test"]
    print(tabulate(sorted(table, key=lambda row: float(row[1].rstrip("%"))), heads, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
