"""The main job on the embedded model: calibrate, search, skip, evaluate, time; what ``modes-fx demo`` runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from modes_fx import __version__
from modes_fx.calib import Objective, Trial, layer_importance, search
from modes_fx.demo.data import as_data, collate, make_batches, make_samples
from modes_fx.files import strict_json
from modes_fx.files.writing import check_writable, in_any_case, write_atomically
from modes_fx.measure.compare.run import Progress
from modes_fx.measure.demo.page import write_demo_page
from modes_fx.measure.demo.timing import time_settings
from modes_fx.measure.page.closeup import look_closely
from modes_fx.optimize import optimize, report, restore, stats
from modes_fx.plan import SkipPlan

TARGETS = (0.5, 0.75, 0.875)


@dataclass(frozen=True)
class Size:
    """How much data each part takes.

    Attributes:
        calibration_images: Canvases for importance and search, with 8 questions each.
        held_out_images: Canvases of the validation split on which each chosen point is measured.
        test_images: Canvases of the test split.
        grid_size: Thresholds tried for each modality.
        rounds: Timed rounds.
    """

    calibration_images: int = 12
    held_out_images: int = 12
    test_images: int = 64
    grid_size: int = 14
    rounds: int = 9


def run_demo(
    load: Callable[[], tuple[nn.Module, Any]], out: Path, *, targets: Sequence[float] = TARGETS, size: Size, progress: Progress
) -> dict[str, Any]:
    """Run the main job and write ``plan.json``, ``report.json``, ``report.html``.

    Args:
        load: Returns a fresh model, where everything is to run, and its processor.
        out: Folder to write to.
        targets: Skip ratios to search for.
        size: How much data to use.
        progress: Told of each step.

    Returns:
        What ``report.json`` holds.

    Raises:
        ModesFxError: The folder cannot be written to.
    """
    check_writable(out, folder=True)
    seconds: dict[str, float] = {}
    model, processor = load()

    def batches(split: str, images: int) -> list[dict[str, Any]]:
        return make_batches(split, images, processor)

    calibration, test = batches("calibration", size.calibration_images), batches("test", size.test_images)
    optimize(model)
    with _timed(seconds, "calibrate"):
        importance = layer_importance(model, calibration, on_step=lambda d, n: progress("importance of each layer", d, n))
    trials: list[Trial] = []

    def on_trial(trial: Trial) -> None:
        trials.append(trial)
        progress("search for thresholds", len(trials), None)

    with _timed(seconds, "search"):
        plan = search(
            model, calibration, importance, targets, grid_size=size.grid_size, on_trial=on_trial,
            held_out=batches("validation", size.held_out_images),
        )  # fmt: skip
    plan.save(out / "plan.json")

    with _timed(seconds, "evaluate"):
        dense, rows = _evaluate(model, plan, test, progress)
        sites = report(model)
        closeup = look_closely(
            model, plan, processor, test, as_data(make_samples("test", size.test_images)),
            on_step=lambda d, n: progress("look at a few samples", d, n),
        )  # fmt: skip
        restore(model)
        optimize(model, SkipPlan.reduce_k(1))
        reduce_k = _evaluate_reduce_k(model, test, progress)
    with _timed(seconds, "time"):
        device = next(model.parameters()).device
        prompts = {key: value.to(device) for key, value in collate(make_samples("test", 1), processor, answers=False).items()}
        speed = time_settings(
            lambda: load()[0], prompts, plan, rounds=size.rounds, on_step=lambda d, n: progress("time against stock", d, n)
        )
    config: Any = model.config
    text = config.get_text_config()
    facts = {
        "model": {
            "name": type(model).__name__,
            "layers": len(plan.layers),
            "experts": text.num_experts,
            "top_k": text.num_experts_per_tok,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        },
        "dense": dense,
        "layers": list(plan.layers),
        "alpha": [list(row) for row in importance.alpha],
        "targets": rows,
        "reduce_k": reduce_k,
        "sites": {"found": sites.found, "rewritten": len(sites.rewritten), "rejected": len(sites.rejected)},
        "search": {**plan.provenance["search"], "trials": [trial.flat() for trial in trials]},
        "speed": speed,
        "seconds": {part: round(value, 1) for part, value in seconds.items()},
        "versions": {"modes_fx": __version__, **plan.provenance["versions"]},
    }
    in_any_case(
        lambda: write_atomically(out / "report.json", strict_json.dumps(facts)),
        lambda: write_demo_page(facts, closeup, out / "report.html"),
    )
    return facts


def _evaluate(
    model: nn.Module, plan: SkipPlan, test: list[dict[str, Any]], progress: Progress
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    objective = Objective(model, test)
    rows = []
    for done, target in enumerate(plan.targets):
        counts = stats(model).reset()
        measured = objective.evaluate(plan.bounds(objective.num_layers, target))
        by_layer = {
            modality: [counts.skip_ratio(layer=layer, modality=modality) for layer in range(objective.num_layers)]
            for modality in ("text", "vision")
        }
        point = plan.point(target)
        rows.append(
            {
                "target": target,
                "gamma": point.gamma,
                "tau": {"text": point.tau_text, "vision": point.tau_vision},
                "realised": {
                    "calibration": point.realised["calibration"],
                    "held_out": point.realised["held_out"],
                    "test": measured.skip_ratio,
                    "text": measured.skip_ratio_text,
                    "vision": measured.skip_ratio_vision,
                },
                "kl": {**point.kl, "test": measured.kl},
                "accuracy": measured.accuracy,
                "retained": measured.accuracy / objective.accuracy if objective.accuracy else None,
                "by_layer": by_layer,
            }
        )
        progress("evaluate on the test split", done + 1, len(plan.targets))
    samples = sum(len(batch["labels"]) for batch in test)
    return {"accuracy": objective.accuracy, "n": samples, "answer_tokens": objective.answer_tokens}, rows


def _evaluate_reduce_k(model: nn.Module, test: list[dict[str, Any]], progress: Progress) -> list[dict[str, Any]]:
    """Measure the static rule that keeps each token's k largest weights, for k = K/2, K/4, ... 1."""
    objective = Objective(model, test)
    top_k = report(model).sites[0].top_k
    chosen = [top_k >> shift for shift in range(1, top_k.bit_length())]
    rows = []
    for done, k in enumerate(chosen):
        measured = objective.evaluate(SkipPlan.reduce_k(k).bounds(objective.num_layers))
        rows.append({"k": k, "ratio": measured.skip_ratio, "kl": measured.kl, "accuracy": measured.accuracy})
        progress("evaluate Reduce-k", done + 1, len(chosen))
    return rows


@contextlib.contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[part] = time.monotonic() - started
