"""Calibration in a process of its own, its graphs run without Inductor: ``python -m tests.calib.worker COMMAND ...``."""

import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from modes_fx import cli
from modes_fx.calib import Importance, Objective, Trial, layer_importance, processes, search
from modes_fx.calib.objective import optimized
from modes_fx.calib.trials import data_hash, short_hash
from modes_fx.errors import CalibrationError
from tests import harness, tiny
from tests.calib.conftest import with_answers

IMPORTANCE = Importance(((0.6, 1.0), (0.4, 0.0)), ((0.6, 1.0), (0.4, 0.0)), "reference", 12)
TARGETS = (0.3, 0.6)
SEARCH: dict[str, Any] = {"gammas": (0.5, 1.0), "grid_size": 5}
SPLITS = {"uneven": ((3, 1, 0), (2,)), "empty": ((0, 1, 2, 3), ()), "empty main": ((), (0, 1, 2, 3))}
WHOLE = (0, 1, 2, 3)


def batch(index: int) -> dict[str, torch.Tensor]:
    return with_answers(index, side="right" if index % 2 else "left")


def measure(model: nn.Module, indices: tuple[int, ...], journal: Path) -> dict[str, Any]:
    """All that processes must agree on, of this process's share; the model is optimised."""
    batches = [batch(index) for index in indices]
    objective = Objective(model, batches)
    evaluation = objective.evaluate(torch.tensor([[0.3, 0.4], [0.5, 0.2]]))
    routing = objective.routing_weights()
    importance = layer_importance(model, batches)
    plan = search(model, batches, IMPORTANCE, TARGETS, journal=journal, **SEARCH)
    again = search(model, batches, IMPORTANCE, TARGETS, journal=journal, **SEARCH)
    return {
        "evaluation": vars(evaluation),
        "accuracy": objective.accuracy,
        "answer_tokens": [objective.answer_tokens, importance.answer_tokens],
        "kl": importance.kl,
        "routing": short_hash(routing.counts.numpy().tobytes()),
        "data": data_hash(batches),
        "points": [
            [p.target, p.gamma, p.tau_text, p.tau_vision, p.kl["calibration"], *p.realised.values()] for p in plan.points
        ],
        "from_journal": [p.provenance["search"]["evaluations"] - p.provenance["search"]["from_journal"] for p in (plan, again)],
        "evaluations": plan.provenance["search"]["evaluations"],
    }


def several(rank: int, world: int, folder: Path) -> None:
    """Join a group and measure with each way of splitting the data; write this process's results."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    refusals = {}
    with optimized(tiny.make()) as model:
        results = {name: measure(model, split[rank], folder / f"{name}.jsonl") for name, split in SPLITS.items()}
        for name, share in (
            ("nothing at all", []),
            ("one without labels", [{"input_ids": torch.ones(1, 2)}] if rank else [batch(0)]),
        ):
            try:
                Objective(model, share)
            except CalibrationError as error:
                refusals[name] = str(error)
        try:
            search(model, [batch(rank)], IMPORTANCE, journal=folder / "uneven.jsonl")
        except CalibrationError as error:
            refusals["journal of other data"] = str(error)
    agreed = {"total": processes.total(torch.tensor([float(rank), 1.0])).tolist(), "gather": processes.gather(rank)}
    (folder / f"{rank}.json").write_text(json.dumps({"results": results, "refusals": refusals, "agreed": agreed}))
    dist.destroy_process_group()


def killed_search(journal: Path, trials: int) -> None:
    """Search with a journal, and be killed after so many trials, as by a machine that runs out of memory."""
    made = itertools.count(1)

    def end(trial: Trial) -> None:
        if next(made) == trials:
            os.kill(os.getpid(), signal.SIGKILL)

    search(tiny.make(), [batch(0)], IMPORTANCE, TARGETS, journal=journal, on_trial=end, **SEARCH)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        harness.compile_with(patch, harness.uncompiled)
        if sys.argv[1] == "command":
            cli.app(sys.argv[2:])
        elif sys.argv[1] == "several":
            several(int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
        else:
            killed_search(Path(sys.argv[2]), int(sys.argv[3]))
