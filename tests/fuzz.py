"""Damaged files, by the thousand: each is refused with one of our errors, or read as the content that it had.

    python -m tests.fuzz --mutations 100000 --seed 0    # `make fuzz`; fails on the first file that is neither, and leaves it
    python -m tests.fuzz --seed 0 --readers plan        # what one reader was given, again

Files that are signed must never be read as anything else. Others (data, configs and pickles of somebody else's) have no digest:
what is asked of their readers is that they raise nothing but our errors.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import pickle
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from modes_fx.calib import Importance, import_reference
from modes_fx.calib.importance_file import ImportanceFile
from modes_fx.calib.journal import Journal
from modes_fx.calib.safe_pickle import load_numbers
from modes_fx.data import load_samples
from modes_fx.demo import CHECKPOINT
from modes_fx.errors import ModesFxError
from modes_fx.files.shipped import FOLDER, read_shipped
from modes_fx.models.meta_model import read_config
from modes_fx.plan import PlanPoint, SkipPlan

ABOUT = {"model": "m", "data": "d", "versions": {"torch": "2"}}
JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 2, 3, 0.5, 1e308, 10**400, "", "inf", "nan", "text", [], [[]], {}, {"a": []}, [None], "\ud800",
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """One kind of file.

    Attributes:
        name: What it is called here.
        share: How often it is drawn, beside the others.
        write: Writes a whole file to a path.
        read: Returns its content, comparable by ``==``.
        same: Whether what was read may stand for the whole content.
        lines: Whether it is JSON a line; None: it is no JSON.
    """

    name: str
    share: int
    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    same: Callable[[Any, Any], bool] = lambda found, whole: bool(found == whole)
    lines: bool | None = None


def anything(found: Any, whole: Any) -> bool:
    """Take whatever was read, of a file without a digest."""
    return True


def _plan() -> SkipPlan:
    points = (PlanPoint(0.5, 0.01, 0.02, 0.5, {"calibration": 0.51}, {"calibration": 0.1}), PlanPoint(0.875, 0.1, float("inf")))
    frontier = tuple(PlanPoint(None, 0.01, 0.02, 0.5, {"calibration": each}, {"calibration": each}) for each in (0.25, 0.5))
    model = {"model_type": "mixtral", "config_hash": "0123456789abcdef", "vision_token_ids": [151655]}
    provenance = {"seed": 3, "versions": {"torch": "2"}, "command": ["modes-fx", "search"]}
    weights = (((0.1, 0.25), (0.1, 0.5)),) * 2
    alpha = ((0.6, 0.75), (0.4, 0.25))
    return SkipPlan(points, alpha, ("a.experts", "b.experts"), model, provenance, frontier=frontier, weights=weights)


def _importance() -> ImportanceFile:
    rows = ((0.5, 0.25), (0.5, 0.75))
    measured = Importance(rows, rows, "reference", 12, "resumed", 2.5, 3.0)
    return ImportanceFile(
        measured, ("a", "b"), {"model_type": "mixtral", "config_hash": "0", "vision_token_ids": []}, "d", {"torch": "2"}
    )


def _fill(path: Path) -> None:
    journal = Journal(path, ABOUT)
    for step in range(4):
        journal.add(("trial", step / 4, 1 / 3), {"kl": 1e-17 + step, "skip_ratio_vision": None, "text": [0.0, 0.1]})


def _entries(path: Path) -> dict[Any, Any]:
    return dict(Journal(path, ABOUT)._entries)


def _fill_jsonl(path: Path) -> None:
    rows = [{"id": number, "question": "What is it?", "answer": ["a cat"], "image": "cat.png"} for number in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (4, 4)).save(path.parent / "cat.png")


def _samples(path: Path) -> Any:
    return list(load_samples(path, format="jsonl", max_bad=1))


def _fill_image(path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(path, "PNG")
    path.with_suffix(".jsonl").write_text(json.dumps({"question": "q", "answer": "a", "image": path.name}) + "\n")


def _reference(path: Path) -> Any:
    return import_reference(path, path.with_suffix(".tau"), read_config(CHECKPOINT))


def _fill_reference(path: Path) -> None:
    torch.save({"tau_text": 0.1, "tau_vision": 0.2}, path.with_suffix(".tau"))
    torch.save({f"layers.{layer}": torch.full((2,), 0.25) for layer in range(4)}, path)


def _write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"importance": [[0.5, 0.5], np.ones(2)], "layers": (1, 2.5)}))


READERS = (
    Reader("plan", 30, lambda path: _plan().save(path), SkipPlan.load, lines=False),
    Reader("importance", 20, lambda path: _importance().save(path), ImportanceFile.load, lines=False),
    Reader("journal", 30, _fill, _entries, lambda found, whole: found.items() <= whole.items(), lines=True),
    Reader("digits", 2, lambda path: path.write_bytes(read_shipped("digits.npz")), lambda path: read_shipped(
        "digits.npz", path.parent)),
    Reader("checkpoint", 3, lambda path: path.write_bytes((FOLDER / "checkpoint/config.json").read_bytes()),
        lambda path: read_shipped("checkpoint/config.json", path.parents[1]), lines=False),
    Reader("config", 3, lambda path: path.write_bytes((CHECKPOINT / "config.json").read_bytes()), read_config, anything, False),
    Reader("jsonl", 6, _fill_jsonl, _samples, anything, lines=True),
    Reader("image", 3, _fill_image, lambda path: _samples(path.with_suffix(".jsonl")), anything),
    Reader("reference", 2, _fill_reference, _reference, anything),
    Reader("pickle", 6, _write_pickle, load_numbers, anything),
)  # fmt: skip
_NAMES = {"digits": "digits.npz", "checkpoint": "checkpoint/config.json", "config": "config.json", "jsonl": "data.jsonl"}


def mutated(data: bytes, rng: random.Random, lines: bool | None) -> bytes:
    """Return a file's bytes, damaged in one of several ways."""
    kinds = [_flip, _flip, _truncate, _cut_out, _repeat, _deepen]
    if lines is not None:
        kinds += [_retype(lines)] * 4
    return rng.choice(kinds)(data, rng)


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _cut_out(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randrange(1, 40) :]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    end = start + rng.randrange(1, 40)
    return data[:end] + data[start:end] * rng.choice((1, 2, 50)) + data[end:]


def _deepen(data: bytes, rng: random.Random) -> bytes:
    start, depth = rng.randrange(len(data)), rng.choice((10, 100, 20_000))
    return data[:start] + rng.choice((b"[", b'{"a":', b"(", b"9")) * depth + data[start:]


def _retype(lines: bool) -> Callable[[bytes, random.Random], bytes]:
    def change(data: bytes, rng: random.Random) -> bytes:
        parts = data.split(b"\n")[:-1] if lines else [data]
        chosen = rng.randrange(len(parts))
        content = json.loads(parts[chosen])
        places = list(_places(content))
        holder, key = rng.choice(places)
        if rng.random() < 0.2:
            del holder[key]
        else:
            holder[key] = rng.choice(JUNK)
        parts[chosen] = json.dumps(content).encode()
        return b"\n".join(parts) + b"\n"

    return change


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield content, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


def fuzz(reader: Reader, mutations: int, rng: random.Random, folder: Path) -> Counter[str]:
    """Damage one kind of file so many times.

    Returns:
        How often it was ``refused``, read as the ``same``, or, of files without a digest, as ``other``.

    Raises:
        AssertionError: It was read as something else, or with another error than ours; the file is left in ``folder``.
    """
    path = folder / _NAMES.get(reader.name, reader.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    reader.write(path)
    data, whole = path.read_bytes(), reader.read(path)
    outcomes: Counter[str] = Counter()
    for _ in range(mutations):
        path.write_bytes(mutated(data, rng, reader.lines))
        try:
            found = reader.read(path)
        except ModesFxError as error:
            said = str(error)
        except Exception as error:
            raise AssertionError(f"{reader.name}: {path} raised {type(error).__name__}: {error}") from error
        else:
            said = ""
        if said:
            assert path.stem in said, f"{path} is refused without its name: {said}"
            outcomes["refused"] += 1
            continue
        same = _equal(found, whole)
        assert same or reader.same(found, whole), f"{reader.name}: {path} was read as something else: {found}"
        outcomes["same" if same else "other"] += 1
    return outcomes


def _equal(found: Any, whole: Any) -> bool:
    return repr(found) == repr(whole)


def shares(mutations: int) -> Iterator[tuple[Reader, int]]:
    """Return each reader and how many of all mutations are its."""
    total = sum(reader.share for reader in READERS)
    return ((reader, max(mutations * reader.share // total, 1)) for reader in READERS)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what readers and decoders say off the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    names = [reader.name for reader in READERS]
    parser.add_argument("--readers", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    options = parser.parse_args()
    for reader, count in shares(options.mutations):
        if reader.name not in options.readers:
            continue
        started = time.monotonic()
        with quiet():
            outcomes = fuzz(reader, count, random.Random(f"{options.seed} {reader.name}"), Path(tempfile.mkdtemp()))
        found = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
        sys.stdout.write(f"{reader.name}: {count} mutations in {time.monotonic() - started:.0f} s: {found}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
