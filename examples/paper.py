"""The paper's table beside yours: calibrate, search, evaluate by lmms-eval on its thirteen benchmarks, print both.

For one to eight GPUs: each takes a copy of the model where one holds it, else all share one. First it says what memory that
takes and what is here, then (after a few forwards, and a few questions of each benchmark) how long it will take:

    hf download lmms-lab/GQA --repo-type dataset --include 'testdev_balanced_*/*' --local-dir GQA
    python examples/paper.py qwen3-vl-30b-a3b --data GQA --estimate    # that alone
    python examples/paper.py qwen3-vl-30b-a3b --data GQA               # all; also kimi-vl-a3b and internvl-3.5-30b

Run again after a crash, it goes on where it stopped; a benchmark that fails stops no other. The whole of it on the embedded
model and a few of its own questions, offline, on a CPU, in a minute:

    python examples/paper.py qwen3-vl-30b-a3b --tiny
"""

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from queue import Queue
from typing import Any

from published.estimate import Pilot, Placement, found_here, gigabytes, hours, memory, placement
from published.figures import BENCHMARKS, DEMO, MODELS, Benchmark
from published.scores import Run, read, results_in, table
from tabulate import tabulate

from modes_fx.calib.search import GAMMAS
from modes_fx.errors import ModesFxError
from modes_fx.files.writing import check_writable, write_atomically
from modes_fx.lmms import TASKS

PILOT_QUESTIONS = 4
TINY = {
    "weights": "demo", "samples": 32, "batch_size": 16, "eval_batch_size": 8, "targets": [0.75], "gammas": [0.5],
    "grid_size": 6, "benchmarks": ["demo"], "limit": 8, "out": Path("out/paper/tiny"),
}  # fmt: skip
"""What ``--tiny`` stands for, where nothing else is said."""


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS, help="whose figures of the paper to compare with")
    parser.add_argument("--weights", help="another folder or hub id of that kind, or demo; the published ones if left out")
    parser.add_argument("--data", type=Path, help="calibration data, such as GQA; left out for demo, which has its own")
    parser.add_argument("--samples", type=int, default=1024, help="of the calibration data, as the paper takes")
    parser.add_argument("--batch-size", type=int, default=8, help="samples a batch of calibration and search")
    parser.add_argument("--eval-batch-size", type=int, default=1, help="questions a batch of the evaluation")
    parser.add_argument("--targets", type=float, nargs="+", help="skip ratios; the paper's if left out")
    parser.add_argument("--gammas", type=float, nargs="+", default=list(GAMMAS), help="exponents of the importance to try")
    parser.add_argument("--grid-size", type=int, default=24, help="thresholds tried for each modality")
    parser.add_argument("--time-budget", help="for the search, which then takes the best it found: 30m, or 2h")
    parser.add_argument("--benchmarks", nargs="+", help="some of the paper's, or demo; all if left out")
    parser.add_argument("--limit", type=int, help="questions of each benchmark; all if left out")
    parser.add_argument("--max-frames", type=int, default=32, help="frames of a video")
    parser.add_argument("--estimate", action="store_true", help="say what memory and time it takes, and stop")
    parser.add_argument("--out", type=Path, help="folder for all that is made; out/paper/MODEL if left out")
    parser.add_argument("--tiny", action="store_true", help="the embedded model and few of its questions; other options count")
    parser.add_argument("--pilot", action="store_true", help=argparse.SUPPRESS)  # the estimate's own process
    options = parser.parse_args()
    if options.tiny:
        parser.set_defaults(**TINY)
        options = parser.parse_args()
    published = MODELS[options.model]
    options.weights = options.weights or published.weights
    options.targets = options.targets or list(published.skipped)
    known = {benchmark.name: benchmark for benchmark in (*BENCHMARKS, DEMO)}
    names = options.benchmarks or [benchmark.name for benchmark in BENCHMARKS]
    if unknown := set(names) - set(known):
        parser.error(f"unknown benchmarks {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    options.benchmarks = [known[name] for name in names]
    if options.data is None and options.weights != "demo":
        parser.error("pass --data; only --weights demo brings its own")
    if options.data is not None and not options.data.exists():
        parser.error(f"there is no {options.data} (--data)")
    options.out = options.out or Path("out/paper") / options.model
    check_writable(options.out, folder=True)  # known before hours of work
    return options


def check_scoring(benchmarks: list[Benchmark]) -> None:
    """See before any work that what the scores need is there."""
    modules = {name for benchmark in benchmarks for name in ("lmms_eval", *benchmark.needs)}
    missing = sorted(name for name in modules if importlib.util.find_spec(name) is None)
    if missing:
        raise SystemExit(f"Not installed: {', '.join(missing)}. See docs/lmms-eval.md, or choose other --benchmarks.")
    if any(benchmark.name == "COCO" for benchmark in benchmarks) and shutil.which("java") is None:
        raise SystemExit("The scores of COCO need Java, which is not on the PATH. Install it, or choose other --benchmarks.")
    judged = [benchmark.name for benchmark in benchmarks if benchmark.judged]
    if judged and not os.environ.get("OPENAI_API_KEY"):
        raise SystemExit(
            f"A language model rates the answers of {' and '.join(judged)}: set OPENAI_API_KEY (and OPENAI_API_URL and "
            "MODEL_VERSION for another than OpenAI's; the paper took DeepSeek-V3.1), or choose other --benchmarks."
        )


def check_settings(options: argparse.Namespace) -> None:
    """Note what the results depend on; refuse a folder that holds those of other settings."""
    names = ("model", "weights", "data", "samples", "batch_size", "targets", "gammas", "grid_size", "limit", "max_frames")
    settings = {name: getattr(options, name) for name in names}
    text = json.dumps(settings, indent=1, default=str)
    file = options.out / "settings.json"
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{options.out} was begun with other settings ({file}). Pass these again, or another --out.")
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text)


def call(*words: object, environment: Mapping[str, str] | None = None, log: Path | None = None) -> None:
    """Print a command, then run it; its output goes to a file where one is named."""
    command = [str(word) for word in words]
    print("$", shlex.join(command), *(["&>", log] if log else []), flush=True)
    with log.open("w") if log else nullcontext() as file:
        ended = subprocess.run(command, env={**os.environ, **(environment or {})}, stdout=file, stderr=file, check=False)
    if ended.returncode:
        raise SystemExit(f"That ended with {ended.returncode}" + (f": see {log}." if log else "."))


def estimate(options: argparse.Namespace) -> Placement:
    """Print what the run takes; measure on the real model what its config does not tell."""
    trusted = MODELS[options.model].trust_remote_code
    needed = memory(options.weights, options.batch_size, options.eval_batch_size, trust_remote_code=trusted)
    sizes, host, visible = found_here()
    rows = [(name, gigabytes(value)) for name, value in asdict(needed).items()]
    rows += [("needed", gigabytes(needed.total))]
    rows += [(f"GPU {index}", gigabytes(size)) for index, size in enumerate(sizes)] or [("no GPU; memory", gigabytes(host))]
    print(tabulate(rows, ["memory, roughly", options.weights], colalign=("left", "right")), flush=True)
    try:
        place = placement(needed.total, sizes, host, visible)
    except MemoryError as error:
        raise SystemExit(str(error)) from error
    file = options.out / "pilot.json"
    names = {benchmark.name for benchmark in options.benchmarks}
    if not file.exists() or not names <= set(_pilot(file).questions):
        call(sys.executable, *sys.argv, "--pilot", environment=_on(place.gpus[0]) if place.gpus else None)
    pilot = _pilot(file)
    steps = hours(
        pilot, batch_size=options.batch_size, targets=len(options.targets), gammas=len(options.gammas),
        grid_size=options.grid_size, copies=place.copies,
    )  # fmt: skip
    rows = [(name, f"{value:.1f} h" if value >= 1 else f"{60 * value:.1f} min") for name, value in steps.items()]
    where = ", over all GPUs" if place.spread else ", each on a GPU" if len(place.gpus) > 1 else ""
    title = f"{place.copies} at a time{where}"
    print(tabulate(rows, ["time", title], colalign=("left", "right")), flush=True)
    return place


def _pilot(file: Path) -> Pilot:
    return Pilot(**json.loads(file.read_text(encoding="utf-8")))


def _on(gpus: str) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": gpus}


def measure(options: argparse.Namespace) -> None:
    """Time forwards of calibration batches, and a few questions of each benchmark, on the stock model; write ``pilot.json``."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from modes_fx import demo
    from modes_fx.calib.objective import Answers
    from modes_fx.data import load_samples, make_batches
    from modes_fx.lmms.model import ModesFx
    from modes_fx.models.layers import find_moe_layers

    place = placement(*_needed(options))
    lm = ModesFx.create_from_arg_string(model_args(options, place, optimize=False, batch_size=options.eval_batch_size))
    if options.data is None:
        samples: Any = demo.as_data(demo.make_samples("calibration", 12))[: options.samples]
    else:
        samples = load_samples(options.data, limit=options.samples)
    seconds, answers = [], Answers(lm.model)
    few = make_batches(samples[: 3 * options.batch_size], lm.processor, options.batch_size, dtype=lm.model.dtype)
    for batch in answers.ready(few):
        started = time.perf_counter()
        answers(batch)[0].cpu()  # waits for the GPU
        seconds.append(time.perf_counter() - started)
    manager = TaskManager(include_path=str(TASKS))
    question_s, questions = {}, {}
    for benchmark in options.benchmarks:
        found: Any = simple_evaluate(
            lm, tasks=[benchmark.task], task_manager=manager, limit=PILOT_QUESTIONS, batch_size=options.eval_batch_size,
            predict_only=benchmark.uploads,  # a server is sent whole sets of answers alone
        )  # fmt: skip
        asked = sum(count["effective"] for count in found["n-samples"].values())
        question_s[benchmark.name] = found["throughput"]["total_elapsed_time"] / asked
        questions[benchmark.name] = sum(
            min(count["original"], options.limit or count["original"]) for count in found["n-samples"].values()
        )
    forward_s = statistics.median(seconds[1:] or seconds)  # the first one warms up
    pilot = Pilot(len(samples), forward_s, len(find_moe_layers(lm.model)), question_s, questions)
    write_atomically(options.out / "pilot.json", json.dumps(asdict(pilot), indent=1))


def _needed(options: argparse.Namespace) -> tuple[int, list[int], int]:
    trusted = MODELS[options.model].trust_remote_code
    sizes, host, _ = found_here()
    return memory(options.weights, options.batch_size, options.eval_batch_size, trust_remote_code=trusted).total, sizes, host


def model_args(options: argparse.Namespace, place: Placement, **more: object) -> str:
    """Write ``--model_args`` of lmms-eval's ``--model modes_fx``."""
    published = MODELS[options.model]
    own = published.model_args if options.weights == published.weights else ""
    words = [f"pretrained={options.weights}", f"max_frames={options.max_frames}"]
    words += [own] if own else []
    words += ["device_map=auto"] if place.spread else []
    words += ["trust_remote_code=True"] if published.trust_remote_code else []
    return ",".join([*words, *(f"{name}={value}" for name, value in more.items())])


def plan_of(options: argparse.Namespace, place: Placement) -> Path:
    """Calibrate and search, on all copies together, unless that was done."""
    importance, plan = options.out / "importance.json", options.out / "plan.json"
    several = ["-m", "torch.distributed.run", "--nproc-per-node", place.copies] if place.copies > 1 else []
    common = ["--samples", options.samples, "--batch-size", options.batch_size]
    common += ["--data", options.data] if options.data else []
    common += ["--device-map", "auto"] if place.spread else []
    common += ["--trust-remote-code"] if MODELS[options.model].trust_remote_code else []
    if not importance.exists():
        journal = options.out / "importance.jsonl"
        call(
            sys.executable, *several, "-m", "modes_fx", "calibrate", options.weights, *common,
            "--out", importance, "--journal", journal,
        )  # fmt: skip
    if not plan.exists():
        call(
            sys.executable, *several, "-m", "modes_fx", "search", options.weights, *common, "--importance", importance,
            "--targets", *options.targets, "--gammas", *options.gammas, "--grid-size", options.grid_size,
            *(["--time-budget", options.time_budget] if options.time_budget else []),
            "--out", plan, "--journal", options.out / "search.jsonl",
        )  # fmt: skip
    return plan


def evaluate(options: argparse.Namespace, place: Placement, plan: Path) -> dict[float | None, dict[str, Run]]:
    """Evaluate each benchmark under each setting (None: stock), as many at a time as there are copies, but what was done."""
    free: Queue[str] = Queue()
    for gpus in place.gpus or ("",):
        free.put(gpus)

    def one(target: float | None, benchmark: Benchmark) -> Run:
        folder = options.out / "eval" / ("stock" if target is None else f"{target:.3f}") / benchmark.task
        if results_in(folder) is None:
            settings = {"optimize": False} if target is None else {"plan": plan, "target": target}
            given = model_args(options, place, **settings)
            limit = ["--limit", options.limit] if options.limit else []
            folder.mkdir(parents=True, exist_ok=True)
            gpus = free.get()
            try:
                call(
                    sys.executable, "-m", "lmms_eval", "--model", "modes_fx", "--model_args", given,
                    "--tasks", benchmark.task, "--include_path", TASKS, "--batch_size", options.eval_batch_size, *limit,
                    "--output_path", folder, "--log_samples", "--verbosity", "DEBUG",  # without it a failure ends with 0
                    environment=_on(gpus) if gpus else None, log=folder / "log.txt",
                )  # fmt: skip
            finally:
                free.put(gpus)
        file = results_in(folder)
        if file is None:
            raise SystemExit(f"lmms-eval left no results in {folder}: see {folder / 'log.txt'}.")
        try:
            return read(file, benchmark)
        except ValueError as error:
            raise SystemExit(str(error)) from error

    with ThreadPoolExecutor(free.qsize()) as pool:
        waiting = [
            (target, benchmark, pool.submit(one, target, benchmark))
            for target in (None, *options.targets)
            for benchmark in options.benchmarks
        ]
        found: dict[float | None, dict[str, Run]] = {}
        for target, benchmark, future in waiting:
            found.setdefault(target, {})[benchmark.name] = future.result()
    return found


def main() -> None:
    """Do it all, or what is left of it."""
    try:
        run(arguments())
    except ModesFxError as error:
        raise SystemExit(f"Error: {error}") from error


def run(options: argparse.Namespace) -> None:
    """Estimate, calibrate, search, evaluate, print."""
    if options.pilot:
        measure(options)
        return
    check_scoring(options.benchmarks)
    check_settings(options)
    place = estimate(options)
    if options.estimate:
        return
    found = evaluate(options, place, plan_of(options, place))
    published = MODELS[options.model]
    text = table(published, options.benchmarks, found.pop(None), found)
    write_atomically(options.out / "table.md", text + "\n")
    print(f"\n{options.weights} beside {published.table} of arXiv 2511.15690 (also in {options.out / 'table.md'})\n\n{text}")


if __name__ == "__main__":
    main()
