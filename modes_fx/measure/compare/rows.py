"""The lines of a comparison, and their mean over several models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from modes_fx.measure.compare.intervals import Interval, mean_interval, ratio_interval
from modes_fx.measure.compare.samples import SampleScores

METRICS = ("kl", "flips", "score", "retained")


def short_names(models: Iterable[str]) -> dict[str, str]:
    """Return, for each model's folder or id, as few of its last parts as tell it from the others."""
    parts = {model: Path(model).parts or (model,) for model in models}
    longest = max(map(len, parts.values()))
    for count in range(1, longest + 1):
        found = {model: "/".join(each[-count:]) for model, each in parts.items()}
        if len(set(found.values())) == len(found):
            break
    return found


@dataclass(frozen=True)
class Row:
    """A rule at one target.

    Attributes:
        rule: Name of the contender.
        title: As shown.
        target: Skip ratio asked for.
        status: ``"reached"``: within the tolerance above the target on calibration data. ``"overshot"``: the rule has no
            setting nearer above. ``"unreachable"``: it cannot skip as much, and nothing else is known.
        largest: The largest skip ratio seen on calibration data while tuning.
        skipped: Skip ratios by name: ``calibration``; on test data ``all``, ``text``, ``vision``, ``prefill`` and, where
            generation was timed, ``decode``: both phases then are those of the timed prompts.
        metrics: On test data: ``kl`` (nats an answer token), ``flips`` (share of answer tokens whose most likely token
            changes), ``score`` (share of samples answered right), ``retained`` (score / the unskipped model's).
        intervals: 95% of each metric: over samples by a paired bootstrap; where several models were averaged, of their mean by
            Student's t, which takes them for independent draws (seeds of training, say) of normal spread.
        speed: Where timed, times as fast as stock's fastest setting, by phase: ``prefill``, ``decode``; NaN where it cannot be
            told.
        point: The thresholds, as in a plan.
        models: How many models it is the mean of.
        spread: Of each metric over several models, the smallest and the largest.
        speed_range: The smallest and the largest of ``speed`` in one round, over all rounds and models.
    """

    rule: str
    title: str
    target: float
    status: str
    largest: float
    skipped: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    speed: Mapping[str, float] = field(default_factory=dict)
    point: Mapping[str, Any] = field(default_factory=dict)
    models: int = 1
    spread: Mapping[str, Interval] = field(default_factory=dict)
    speed_range: Mapping[str, Interval] = field(default_factory=dict)

    def flat(self) -> dict[str, Any]:
        """Return it as one line of a table."""
        kept = {key: value for key, value in asdict(self).items() if not isinstance(value, dict)}
        for name in ("skipped", "metrics", "speed"):
            kept |= {f"{name}_{key}": value for key, value in getattr(self, name).items()}
        for name, (low, high) in self.intervals.items():
            kept |= {f"{name}_low": low, f"{name}_high": high}
        for name, (low, high) in self.speed_range.items():
            kept |= {f"speed_{name}_low": low, f"speed_{name}_high": high}
        return kept | {f"point_{name}": self.point.get(name) for name in ("tau_text", "tau_vision", "gamma")}


def measured(scores: SampleScores, unskipped: SampleScores, seed: int) -> tuple[dict[str, float], dict[str, Interval]]:
    """Return the metrics of one rule on test data, and their intervals over samples."""
    ones, right = torch.ones(len(scores.kl_S)), unskipped.correct_S.double()
    pairs = {
        "kl": (scores.kl_S, scores.tokens_S),
        "flips": (scores.flips_S, scores.tokens_S),
        "score": (scores.correct_S, ones),
        "retained": (scores.correct_S, right),
    }
    present = {name: (over.double(), under.double()) for name, (over, under) in pairs.items() if under.sum() > 0}
    return (
        {name: float(over.sum() / under.sum()) for name, (over, under) in present.items()},
        {name: ratio_interval(over, under, seed=seed) for name, (over, under) in present.items()},
    )


def mean_row(rows: Sequence[Row]) -> Row:
    """Return the mean of one rule's rows at one target over models; what one model could not reach has no mean."""
    if len(rows) == 1:
        return rows[0]
    worst = max(rows, key=lambda row: ("reached", "overshot", "unreachable").index(row.status))
    common = Row(rows[0].rule, rows[0].title, rows[0].target, worst.status, min(row.largest for row in rows), models=len(rows))
    if worst.status == "unreachable":
        return common

    def mean(name: str) -> dict[str, float]:
        tables: list[Mapping[str, float]] = [getattr(row, name) for row in rows]
        return {key: sum(table[key] for table in tables) / len(tables) for key in tables[0] if all(key in t for t in tables)}

    metrics = mean("metrics")
    values = {name: [row.metrics[name] for row in rows] for name in metrics}
    timed = {name: [end for row in rows for end in row.speed_range[name]] for name in mean("speed")}
    return replace(
        common,
        skipped=mean("skipped"),
        metrics=metrics,
        intervals={name: mean_interval(each) for name, each in values.items()},
        spread={name: (min(each), max(each)) for name, each in values.items()},
        speed=mean("speed"),
        speed_range={name: (min(ends), max(ends)) for name, ends in timed.items()},
    )
