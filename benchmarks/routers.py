"""Which rule loses least on which router and job: small models trained from scratch, compared, and one page of it all.

    python benchmarks/routers.py [--architectures ...] [--jobs grid pairs] [--seeds 0 1 2] [--targets 0.5 0.75 0.875]
        [--rules ...] [--grid-size 14] [--at-once 2] [--out out/routers]

For each architecture and seed a model is trained for both jobs (``examples/train_demo_model.py``, half an hour to an hour on
one thread); then ``modes-fx compare`` tunes every rule on 96 questions of each job and measures it on 512 others, where the
means over seeds and their intervals are its own. What is in OUT already is not done again, so that a run that was cut off
goes on.
The page, ``OUT/routers.md``, has one table for each job: KL in nats an answer token with its interval, the least of each column
bold.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tabulate import tabulate

from modes_fx.files.writing import write_atomically
from modes_fx.models.device import cpu_name

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("qwen3_vl_moe", "deepseek_v3", "gpt_oss")
JOBS = ("grid", "pairs")
GROUPS = {"calibration": 12, "test": 64}
LOG, QUESTIONS = "training_log.json", "questions.jsonl"


def run(*command: str) -> None:
    """Run one step, on one thread, and fail with it."""
    print("+", *command, flush=True)
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def train(architecture: str, seed: int, out: Path) -> Path:
    """Return a model that has been trained to the end."""
    folder = out / "models" / f"{architecture}-{seed}"
    log = folder / LOG
    if not log.is_file() or "test_bfloat16" not in json.loads(log.read_text()):
        script = ["examples/train_demo_model.py", "--architecture", architecture, "--job", "pairs"]
        run(*script, "--seed", str(seed), "--every", "500", "--out", str(folder))
    return folder


def questions(job: str, split: str, out: Path) -> Path:
    """Return the file of a job's questions."""
    folder = out / "questions" / f"{job}-{split}"
    if not (folder / QUESTIONS).is_file():
        run("examples/make_demo_data.py", "--job", job, "--split", split, "--groups", str(GROUPS[split]), "--out", str(folder))
    return folder / QUESTIONS


def compare(models: Sequence[Path], job: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what a comparison wrote."""
    out = options.out / name
    data = [str(questions(job, split, options.out)) for split in GROUPS]
    command = ["-m", "modes_fx", "compare", *map(str, models), "--data", data[0], "--test-data", data[1], "--out", str(out)]
    command += ["--dtype", "float32"]  # three times as fast as bfloat16 on processors without matrix units
    for target in options.targets:
        command += ["--targets", str(target)]
    for rule in options.rules or ():
        command += ["--rules", rule]
    sizes = {"--samples": GROUPS["calibration"] * 8, "--test-samples": GROUPS["test"] * 8, "--grid-size": options.grid_size}
    run(*command, *(str(item) for pair in sizes.items() for item in pair), "--journal", f"{out}.jsonl")
    found: dict[str, Any] = json.loads((out / "compare.json").read_text())
    return found


def table(job: str, found: Mapping[str, Mapping[str, Any]], targets: Sequence[float]) -> str:
    """Return one job's table: rules by architectures and targets."""
    names = [name for name in ARCHITECTURES if name in found]
    rows = {(row["rule"], name, row["target"]): row for name in names for row in found[name]["rows"]}
    titles = {row["rule"]: row["title"] for name in names for row in found[name]["rows"]}
    columns = [(name, target) for name in names for target in targets]
    kl = {key: row["metrics"]["kl"] for key, row in rows.items() if row["metrics"]}
    lines = []
    for rule, title in titles.items():
        cells = []
        for column in columns:
            row, best = (
                rows.get((rule, *column)),
                min((value for key, value in kl.items() if key[1:] == column), default=math.nan),
            )
            cells.append("does not run" if row is None else _cell(row, best))
        lines.append([title, *cells])
    scores = [f"{name}: {_mean(each['unskipped']['score'] for each in found[name]['models'].values()):.1%}" for name in names]
    heads = ["rule", *(f"{name}, {target:.1%}".replace(".0%", "%") for name, target in columns)]
    return f"## {job}\n\nRight without skipping: {', '.join(scores)}.\n\n" + tabulate(lines, heads, tablefmt="github") + "\n"


def _cell(row: Mapping[str, Any], best: float) -> str:
    if row["status"] == "unreachable":
        return f"at most {row['largest']:.1%}"
    low, high = row["intervals"]["kl"]
    text = f"{row['metrics']['kl']:.1e}"
    text = f"**{text}**" if row["metrics"]["kl"] == best else text
    return f"{text} ({low:.0e} to {high:.0e})" + (f", at {row['skipped']['all']:.1%}" if row["status"] == "overshot" else "")


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)


def main() -> None:
    """Train, compare and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--targets", nargs="+", type=float, default=[0.5, 0.75, 0.875])
    parser.add_argument("--rules", nargs="+", help="all if left out; see modes-fx compare")
    parser.add_argument("--grid-size", type=int, default=14)
    parser.add_argument("--at-once", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=Path("out/routers"))
    options = parser.parse_args()
    options.out = options.out.absolute()
    for job in options.jobs:
        for split in GROUPS:
            questions(job, split, options.out)
    with ThreadPoolExecutor(options.at_once) as pool:
        trained = {
            (name, seed): pool.submit(train, name, seed, options.out)
            for seed in options.seeds
            for name in options.architectures
        }
        models = {name: [trained[name, seed].result() for seed in options.seeds] for name in options.architectures}
        compared = {
            (job, name): pool.submit(compare, models[name], job, f"{name}-{job}", options)
            for job in options.jobs
            for name in options.architectures
        }
        found = {key: each.result() for key, each in compared.items()}
    page = [f"Seeds {', '.join(map(str, options.seeds))}; {cpu_name()}.\n"]
    page += [
        table(job, {name: each for (of, name), each in found.items() if of == job}, options.targets) for job in options.jobs
    ]
    print(write_atomically(options.out / "routers.md", "\n".join(page)).read_text())


if __name__ == "__main__":
    main()
