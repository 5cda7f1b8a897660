"""Commands that are killed at random moments and run again until they end: the result is that of a run that nobody cut.

    python -m tests.crash --kills 50 --seed 0    # `make crash`; fails on the first difference

Kills fall on any moment from a command's start to its end, importing and writing among them. Each measurement is in the journal
once, whether or not it was measured before a kill.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LITTLE = ("--samples", "8", "--batch-size", "4", "--device", "cpu")
OF_ONE_RUN = {"seconds", "evaluations", "written", "created", "digest"}
"""What a result may say of the run that made it."""


def commands(folder: Path, importance: Path) -> dict[str, tuple[list[str], Path, Path]]:
    """Return each command with its result and its journal, in a folder."""
    alpha, plan, compared = folder / "alpha.json", folder / "plan.json", folder / "compare"
    grid = ("--grid-size", "5")
    return {
        "calibrate": (
            ["calibrate", "demo", *LITTLE, "--out", str(alpha), "--journal", str(folder / "calibrate.jsonl")],
            alpha, folder / "calibrate.jsonl",
        ),
        "search": (
            ["search", "demo", *LITTLE, *grid, "--importance", str(importance), "--targets", "0.5", "--out", str(plan),
             "--journal", str(folder / "search.jsonl")],
            plan, folder / "search.jsonl",
        ),
        "compare": (
            ["compare", "demo", *LITTLE, *grid, "--test-samples", "8", "--targets", "0.5", "--out", str(compared),
             "--journal", str(folder / "compare.jsonl")],
            compared / "compare.json", folder / "compare.jsonl",
        ),
    }  # fmt: skip


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """Start a command in a process of its own."""
    call = [sys.executable, "-m", "modes_fx", *arguments]
    return subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a command that is to end well."""
    said = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"{process.args!r} ended with {process.returncode}:\n{said}")


def content(value: Any) -> Any:
    """Return a result without what it says of its own run."""
    if isinstance(value, dict):
        return {name: content(item) for name, item in value.items() if name not in OF_ONE_RUN}
    return [content(item) for item in value] if isinstance(value, list) else value


def entries(journal: Path) -> list[str]:
    """Return the keys in a journal, as they stand there."""
    return [json.dumps(json.loads(line)["key"]) for line in journal.read_text(encoding="utf-8").splitlines()[1:]]


def outcome(result: Path, journal: Path) -> tuple[Any, list[str]]:
    """Return what has to be equal, but for the order of measurements."""
    keys = entries(journal)
    if len(set(keys)) < len(keys):
        raise SystemExit(f"{journal} holds a measurement twice.")
    return content(json.loads(result.read_text(encoding="utf-8"))), sorted(keys)


def cut(arguments: list[str], seconds: float, kills: int, chance: random.Random) -> Iterator[float]:
    """Run a command until it ends, killed at most so often; yield the moment of each kill."""
    for _ in range(kills):
        process, moment = start(arguments), chance.uniform(0, seconds)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            yield moment
            continue
        finish(process)
        return
    finish(start(arguments))


def main() -> None:
    """Run each command whole, then again and again in pieces."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", default=["calibrate", "search", "compare"])
    given = parser.parse_args()
    chance = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        importance = root / "importance.json"
        finish(start(["calibrate", "demo", *LITTLE, "--out", str(importance)]))
        for command in given.commands:
            whole = root / f"{command}-whole"
            whole.mkdir()
            arguments, result, journal = commands(whole, importance)[command]
            started = time.perf_counter()
            finish(start(arguments))
            seconds = time.perf_counter() - started
            wanted, done = outcome(result, journal), 0
            while done < given.kills:
                folder = root / f"{command}-cut"
                folder.mkdir()
                arguments, result, journal = commands(folder, importance)[command]
                moments = list(cut(arguments, seconds, given.kills - done, chance))
                if outcome(result, journal) != wanted:
                    raise SystemExit(f"{command}, killed after {moments} s, ends otherwise than uncut (seed {given.seed}).")
                done += len(moments)
                shutil.rmtree(folder)
            print(f"{command}: {done} kills, the result and the {len(wanted[1])} measurements of a run of {seconds:.0f} s")  # noqa: T201


if __name__ == "__main__":
    main()
