"""Pick samples from a source, check them, and say what was found."""

from __future__ import annotations

import logging
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from modes_fx.data.layouts import FORMATS, find_layout
from modes_fx.data.layouts.layout import Records
from modes_fx.data.sample import Sample
from modes_fx.errors import CalibrationError, ModesFxError, in_a_line

_log = logging.getLogger(__name__)
_SHOWN = 3


@dataclass(frozen=True)
class LoadReport:
    """What became of a source's samples.

    Attributes:
        source: File or folder read.
        format: Layout in which it was read.
        found: Samples in the source.
        chosen: Samples picked of them; those not in ``bad`` were kept.
        bad: For each reason, how many chosen samples were left out for it.
        examples: The first of those, with their ids.
    """

    source: str
    format: str
    found: int
    chosen: int
    bad: Mapping[str, int]
    examples: tuple[str, ...]

    @property
    def kept(self) -> int:
        """How many samples can be used."""
        return self.chosen - sum(self.bad.values())

    def __str__(self) -> str:
        text = f"{self.kept} samples of {self.chosen} chosen from {self.found} in {self.source} ({self.format})"
        if not self.bad:
            return text
        reasons = ", ".join(f"{count} x {reason}" for reason, count in self.bad.items())
        return f"{text}; left out: {reasons}; for example {'; '.join(self.examples)}"


class Samples(Sequence[Sample]):
    """The samples that can be used, in the source's order, and the ``report`` on all that were looked at."""

    def __init__(self, samples: Sequence[Sample], report: LoadReport) -> None:
        self._samples = tuple(samples)
        self.report = report

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        return self._samples[index]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)

    def held_back(self, share: float) -> tuple[Samples, Samples]:
        """Return most of the samples, and the others, spread evenly, for what is to be seen once the first have been used.

        Args:
            share: Of the others, in [0, 1].
        """
        others = [int((index + 1) * share) > int(index * share) for index in range(len(self))]
        parts = ([sample for sample, other in zip(self, others, strict=True) if other is chosen] for chosen in (False, True))
        first, rest = (Samples(part, self.report) for part in parts)
        return first, rest


def load_samples(
    source: str | os.PathLike[str],
    *,
    limit: int | None = 1024,
    seed: int = 0,
    format: str | None = None,
    split: str | None = None,
    frames: int = 32,
    max_bad: float = 0.05,
) -> Samples:
    """Pick samples at random and check each: it has a question and an answer, and its images open.

    Equal arguments give equal samples. One image is held decoded at a time. See ``modes_fx.data.layouts`` for the formats.

    Args:
        source: File or folder.
        limit: Samples to pick; None takes all.
        seed: Another seed picks others.
        format: One of ``FORMATS``; None finds it out from the files.
        split: Needed where the source holds several.
        frames: Most frames to take of a video, evenly spaced.
        max_bad: Share of the picked samples, in [0, 1], that may be unusable; they are left out.

    Raises:
        CalibrationError: The source cannot be read, fits no format, or more than ``max_bad`` of it is unusable.
    """
    path = Path(source)
    if limit is not None and limit < 1:
        raise CalibrationError(f"limit must be at least 1, or None for all samples; got {limit}.")
    if frames < 1:
        raise CalibrationError(f"frames must be at least 1, got {frames}.")
    if not path.exists():
        raise CalibrationError(f"There is no calibration data at {path}. Pass a file or folder; formats: {', '.join(FORMATS)}.")
    layout = find_layout(path, format)
    records = layout.read(path, split, frames)
    rows = list(range(records.count))
    if limit is not None and limit < records.count:
        rows = sorted(random.Random(seed).sample(rows, limit))
    kept: list[Sample] = []
    bad: Counter[str] = Counter()
    examples: list[str] = []
    for sample in _read(records, rows, path):
        if (problem := _problem(sample)) is None:
            kept.append(sample)
            continue
        reason, detail = problem
        bad[reason] += 1
        if len(examples) < _SHOWN:
            examples.append(f"{sample.id}: {detail}")
    report = LoadReport(str(path), layout.name, records.count, len(rows), dict(bad), tuple(examples))
    if not kept or len(rows) - len(kept) > max_bad * len(rows):
        raise CalibrationError(
            f"Too little of the calibration data can be used: {report}. Repair the source, check its format (--data-format) "
            f"or allow a larger share of unusable samples (--max-bad, max_bad) than {max_bad:g}."
        )
    _log.log(logging.WARNING if bad else logging.INFO, "%s", report)
    return Samples(kept, report)


def _read(records: Records, rows: Sequence[int], path: Path) -> Iterator[Sample]:
    try:
        yield from records.read(rows)
    except ModesFxError:
        raise
    except Exception as error:  # what a table raises on a damaged row has no common base
        raise CalibrationError(f"Cannot read {path}: {in_a_line(error)}") from error


def _problem(sample: Sample) -> tuple[str, str] | None:
    """Return why a sample cannot be used, in general and in particular."""
    if not sample.question:
        return "no question", "no question"
    if not sample.answer:
        return "no answer", "no answer"
    try:
        for image in sample.images:
            Sample(sample.id, "", "", (image,)).open_images()
    except CalibrationError as error:
        return "unreadable image", str(error)
    return None
