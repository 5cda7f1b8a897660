"""Commands that are killed at random moments and run again until they end: the result is that of a run that nobody cut.

    python -m tests.crash --kills 50 --seed 0    # `make crash`; fails on the first difference

Kills fall on any moment from a command's start to its end, importing and writing among them. Each measurement is in the journal
once, whether or not it was measured before a kill.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LITTLE = ("--samples", "8", "--batch-size", "4", "--device", "cpu")
OF_ONE_RUN = {"from_journal", "seconds", "digest"}
"""What a result says of the run that made it: how much a journal knew, how long it took, and so the digest of the whole."""


def commands(importance: Path) -> dict[str, tuple[list[str], str, str]]:
    """Return each command with its result and its journal, all in the folder that it runs in."""
    few = ("--grid-size", "5", "--targets", "0.5")
    return {
        "calibrate": (["demo", *LITTLE, "--out", "alpha.json"], "alpha.json", "calibrate.jsonl"),
        "search": (["demo", *LITTLE, *few, "--importance", str(importance)], "plan.json", "search.jsonl"),
        "compare": (["demo", *LITTLE, *few, "--test-samples", "8", "--out", "out"], "out/compare.json", "compare.jsonl"),
    }


def start(command: str, arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    """Start a command in a process of its own, in a folder."""
    call = [sys.executable, "-m", "modes_fx", command, *arguments, "--journal", f"{command}.jsonl"]
    return subprocess.Popen(call, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


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


def cut(run: Callable[[], subprocess.Popen[str]], seconds: float, kills: int, chance: random.Random) -> Iterator[float]:
    """Run a command until it ends, killed at most so often; yield the moment of each kill."""
    for _ in range(kills):
        process, moment = run(), chance.uniform(0, seconds)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            yield moment
            continue
        finish(process)
        return
    finish(run())


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
        finish(start("calibrate", commands(root)["calibrate"][0], root))
        for command in given.commands:
            arguments, result, journal = commands(root / "alpha.json")[command]
            folder = root / command
            run = functools.partial(start, command, arguments, folder)
            folder.mkdir()
            started = time.perf_counter()
            finish(run())
            seconds = time.perf_counter() - started
            wanted, done = outcome(folder / result, folder / journal), 0
            while done < given.kills:
                shutil.rmtree(folder)
                folder.mkdir()
                moments = list(cut(run, seconds, given.kills - done, chance))
                if outcome(folder / result, folder / journal) != wanted:
                    raise SystemExit(f"{command}, killed after {moments} s, ends otherwise than uncut (seed {given.seed}).")
                done += len(moments)
            print(f"{command}: {done} kills, the result and the {len(wanted[1])} measurements of a run of {seconds:.0f} s")  # noqa: T201


if __name__ == "__main__":
    main()
