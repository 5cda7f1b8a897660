"""Does it pay on a GPU? The tests that need one, then times against stock's best, each with the goal that it is held to.

    python -m benchmarks.gpu_check [--parts block decode] [--seconds 480] [--json FILE]
    python -m benchmarks.gpu_check --tiny    # the same code on a CPU, with toy shapes: its ratios mean nothing

For a machine that one has once: eight minutes at most, from a checkout whose `dev` extra is installed. Each part is a process
of its own with so many seconds of them: one that fails, crashes or is stopped leaves its lines of the table open and the others
alone, and the file is written after each. A ratio is the median over rounds of time / time of the fastest stock setting in the
same rounds; lines without a goal say what to set in ``kernels/cuda/sizes.py``, the demo's are in seconds. Weights are random.
*Graph*: the replay of a captured CUDA graph. ``gpu_parts`` says how.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tabulate import tabulate

import modes_fx
from benchmarks.gpu_parts import DECODE, FEW, JOBS, OURS, PARTS, PREFILL, TINY, TUNED, Shapes, Timed, few_pairs
from modes_fx.cli.terminal import be_quiet
from modes_fx.errors import DeviceError, in_a_line
from modes_fx.files import strict_json
from modes_fx.files.writing import write_atomically
from modes_fx.kernels.cuda.sizes import PAIRS_AN_EXPERT
from modes_fx.measure.bench.measure import median_ratio
from modes_fx.models.device import choose_device, describe_device

ROOT = Path(__file__).parent.parent
LIMITS = {"tests": 100, "generate": 140, "block": 70, "decode": 110, "prefill": 60, "calibration": 90, "sizes": 90}
"""Seconds of each part, in their order: those at the end get what the others leave."""
IN_ALL = 480
SECONDS = {"calibrate": 5.0, "search": 10.0}
Goals = tuple[Sequence[float | None], Sequence[float | None]]
GOALS: Mapping[str, Mapping[str, Goals]] = {  # skipped, and the ratios to stay below, or None
    "generate": {
        "8 layers, generate, static cache, decode": (DECODE, (1.0, 0.85, 0.82)),
        "8 layers, generate, dynamic cache, decode": (DECODE, (1.0, 1.0, 1.0)),
    },
    "block": {"block, 1 token, graph": (DECODE, (0.6, 0.4, 0.35)), "block, 8192 tokens": (DECODE, (0.55, 0.35, 0.25))},
    "decode": {
        "48 layers, decode, batch 1, graph": (DECODE, (0.75, 0.68, 0.62)),
        "48 layers, decode, batch 16, graph": (DECODE, (0.8, 0.6, 0.4)),
    },
    "prefill": {"48 layers, prefill 8192": (PREFILL, (0.7, 0.52, 0.46))},
    "sizes": dict.fromkeys((*map(few_pairs, FEW), TUNED), ((0.5,), (None,))),
    "calibration": {what.format(job): ((None,), (goal,)) for what in JOBS for job, goal in SECONDS.items()},
}


@dataclass(frozen=True)
class Line:
    """One line of the table; times are medians in milliseconds, ``note`` says what does not run."""

    what: str
    skipped: float | None = None
    goal: float | None = None
    ratio: float | None = None
    met: bool = False
    ms: float | None = None
    stock_ms: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    def closed(self, why: str) -> "Line":
        """Return the line with a reason for having no ratio, unless there is one or the other."""
        return self if self.ratio is not None or self.note else replace(self, note=why)


def open_lines(part: str) -> list[Line]:
    """Return the lines of a part before anything is measured."""
    if part == "tests":
        return [Line("pytest -m cuda")]
    return [Line(what, *pair) for what, goals in GOALS[part].items() for pair in zip(*goals, strict=True)]


def judged(line: Line, found: Timed) -> Line:
    """Return a line with its ratio, if both sides ran."""
    (times, failed), mine = found, (OURS, line.skipped)
    stock = {name: column for (name, _), column in times.items() if name != OURS}
    note = "; ".join(f"{name}: {why}" for (name, skip), why in failed.items() if name != OURS or skip == line.skipped)
    if mine not in times or not stock:
        return replace(line, note=note)
    medians = {name: statistics.median(column) for name, column in stock.items()}
    ratio = median_ratio(times[mine], stock[min(medians, key=lambda name: medians[name])])
    return replace(
        line,
        ratio=ratio,
        met=line.goal is None or ratio <= line.goal,
        ms=statistics.median(times[mine]),
        stock_ms=medians,
        note=note,
    )


def measure(part: str, shapes: Shapes, device: torch.device, file: Path) -> None:
    """Measure a part in this process, and write all its lines each time that some are known."""
    be_quiet()
    if device.type == "cpu":
        torch.set_num_threads(1)  # several on a busy machine wait for each other
    lines = open_lines(part)
    try:
        with torch.no_grad():
            for what, found in PARTS[part](shapes, device):
                lines = [judged(line, found) if line.what == what else line for line in lines]
                write(file, {"lines": lines})
    except Exception as error:
        write(file, {"lines": [line.closed(in_a_line(error)) for line in lines]})
        raise


def run(part: str, tiny: bool, limit: float) -> list[Line]:
    """Run a part in a process of its own, and return its lines as far as it came."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "part.json"
        check = ["benchmarks.gpu_check", "--parts", part, "--here", "--json", str(file), *["--tiny"] * tiny]
        command = [sys.executable, "-m", *(["pytest", "-q", "-m", "cuda"] if part == "tests" else check)]
        try:
            status = subprocess.run(command, cwd=ROOT, timeout=limit, check=False).returncode
            why = f"ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            why = f"stopped after {limit:.0f} s"
        if part == "tests":
            return [replace(line, met=not why, note=why) for line in open_lines(part)]
        known = [Line(**line) for line in json.loads(file.read_text())["lines"]] if file.exists() else open_lines(part)
        return [line.closed(why or "not measured") for line in known]


def write(file: Path, facts: Mapping[str, Any]) -> None:
    """Write facts, with their lines as objects."""
    write_atomically(file, strict_json.dumps({**facts, "lines": [asdict(line) for line in facts["lines"]]}))


def table(lines: Sequence[Line]) -> str:
    """Return the table to print."""
    cells = [
        (
            line.what,
            "" if line.skipped is None else f"{line.skipped:.0%}",
            "" if line.ratio is None else f"{line.ratio:.2f}",
            "" if line.goal is None else f"{line.goal:.2f}",
            "yes" if line.met else "no" if line.ratio is not None else f"no: {line.note}"[:60],
        )
        for line in lines
    ]
    return tabulate(cells, headers=("what", "skipped", "ratio", "goal", "met"), disable_numparse=True)


def switch(lines: Sequence[Line]) -> str:
    """Say up to how many pairs an expert they are computed one by one as fast as sorted, as ``sizes.PAIRS_AN_EXPERT`` wants it.

    Of Qwen3-VL-30B-A3B: 8 of 128 experts a token.
    """
    ratios = {tokens: line.ratio for tokens in FEW for line in lines if line.what == few_pairs(tokens)}
    known = [(tokens, ratio) for tokens, ratio in ratios.items() if ratio is not None]
    if not known:
        return ""
    pays = list(itertools.takewhile(lambda item: item[1] <= 1, known))
    found = f"up to {pays[-1][0]} tokens: PAIRS_AN_EXPERT = {pays[-1][0] * 8 / 128:g}" if pays else "never: PAIRS_AN_EXPERT = 0"
    measured = "" if len(pays) < len(known) else ", or more"
    return f"Pairs one by one pay {found}{measured} in modes_fx/kernels/cuda/sizes.py, which has {PAIRS_AN_EXPERT:g}."


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write and print; ends with 1 where a goal is missed, or with toy shapes where a line has no ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--seconds", type=float, default=IN_ALL, help=f"in all; a part has these: {LIMITS}")
    parser.add_argument("--json", type=Path, default=Path("out/gpu_check.json"))
    parser.add_argument("--tiny", action="store_true", help="toy shapes, on a CPU")
    parser.add_argument("--here", action="store_true", help="one part, in this process")
    options = parser.parse_args(arguments)
    try:
        device = choose_device("cpu" if options.tiny else "cuda")
    except DeviceError as error:
        parser.error(str(error))
    if options.here:
        return measure(options.parts[0], TINY if options.tiny else Shapes(), device, options.json)
    versions = {"modes_fx": modes_fx.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    lines = {part: open_lines(part) for part in options.parts}
    ends = time.monotonic() + options.seconds
    for part in options.parts:
        left = ends - time.monotonic()
        if left > 0:
            lines[part] = run(part, options.tiny, min(LIMITS[part], left))
        else:
            lines[part] = [line.closed(f"no time left: run it with --parts {part}") for line in lines[part]]
        facts = {"schema": 1, "tiny": options.tiny, "device": describe_device(device), "versions": versions}
        write(options.json, {**facts, "lines": [line for some in lines.values() for line in some]})
    found = [line for some in lines.values() for line in some]
    print(f"{describe_device(device)}, {', '.join(f'{name} {version}' for name, version in versions.items())}")
    print(table(found))
    print(switch(found))
    sys.exit(not all(line.met or (options.tiny and line.ratio is not None) for line in found))


if __name__ == "__main__":
    main()
