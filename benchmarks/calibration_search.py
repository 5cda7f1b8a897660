"""The search parts of ``calibration.py``: exhaustive search, the published two-pointer walk and ours, side by side.

search: on the model itself, each evaluation a forward over the data. search100: D = 100, whose 10,000 points are too many
forwards: f and g are measured at the points of a coarse part of that grid and interpolated between them (bilinear, f by its
square root, made non-decreasing), so its losses are not the model's, but its shapes are. processes: one process against two.
"""

import argparse
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from modes_fx.calib import FrontierResult, Importance, Objective, frontier_search, layer_importance, search
from modes_fx.calib.objective import optimized
from modes_fx.calib.search import predicted_ratio, score_grid
from modes_fx.calib.trials import thresholds
from modes_fx.data import load_samples
from modes_fx.data import make_batches as make_any_batches
from modes_fx.demo import load, make_batches
from modes_fx.models.loading import load as load_any

Row = dict[str, Any]
Function = Callable[[int, int], float]  # of the indices of a text and of a vision threshold
TARGETS = (0.5, 0.75, 0.875)
GAMMA = 0.5
KNOTS = 15  # measured thresholds of each modality, in search100


class Counted:
    """f and g at grid points; one evaluation gives both.

    Args:
        evaluate: Returns (f, g) at a point.
    """

    def __init__(self, evaluate: Callable[[int, int], tuple[float, float]]) -> None:
        """Start with nothing evaluated."""
        self._evaluate = evaluate
        self._known: dict[tuple[int, int], tuple[float, float]] = {}
        self.evaluations = 0

    def forget(self) -> None:
        """Evaluate anew what is asked again."""
        self._known.clear()

    def g(self, q: int, p: int) -> float:
        """Return g; the first time is an evaluation."""
        if (q, p) not in self._known:
            self._known[q, p] = self._evaluate(q, p)
            self.evaluations += 1
        return self._known[q, p][1]

    def f(self, q: int, p: int) -> float:
        """Return f at a point where g was asked."""
        return self._known[q, p][0]


def exhaustive(counted: Counted, columns: int, rows: int) -> list[float]:
    """Return the least loss for each target, of all points."""
    found = dict.fromkeys(TARGETS, math.inf)
    for q, p in itertools.product(range(columns), range(rows)):
        ratio = counted.g(q, p)
        for target in TARGETS:
            if ratio >= target:
                found[target] = min(found[target], counted.f(q, p))
    return list(found.values())


def falls(counted: Counted, columns: int, rows: int) -> str:
    """Return how often f and g fall where one threshold rises by a step, of all such steps, and the largest fall of each."""
    points = itertools.product(range(columns), range(rows))
    steps = [(at, to) for at in points for to in ((at[0] + 1, at[1]), (at[0], at[1] + 1)) if to[0] < columns and to[1] < rows]
    said = []
    for name, of in (("f", counted.f), ("g", counted.g)):
        fell = [of(*at) - of(*to) for at, to in steps if of(*to) < of(*at) * (1 - 1e-9)]
        said.append(f"{name} {len(fell)} of {len(steps)}, at most {max(fell, default=0):.1e}")
    return "; ".join(said)


def two_pointer(counted: Counted, columns: int, rows: int) -> list[float]:
    """Return the same by one walk for each target (arXiv 2511.15690): down while feasible, then on to the next column."""
    found = []
    for target in TARGETS:
        counted.forget()
        best, p = math.inf, rows - 1
        for q in range(columns):
            recorded = None
            while p >= 0 and counted.g(q, p) >= target:
                recorded, p = p, p - 1
            if recorded is not None:
                best = min(best, counted.f(q, recorded))
        found.append(best)
    return found


def ours(counted: Counted, columns: int, rows: int, guess: Function) -> tuple[list[float], FrontierResult]:
    """Return the same by one frontier search for all targets."""
    result = frontier_search(
        lambda q, p: counted.f(int(q), int(p)), lambda q, p: counted.g(int(q), int(p)), range(columns), range(rows), TARGETS,
        g_guess=lambda q, p: guess(int(q), int(p)),
    )  # fmt: skip
    return [math.inf if point is None else point.loss for point in result.points], result


def compared(evaluate: Callable[[int, int], tuple[float, float]], columns: int, rows: int, guess: Function) -> Iterator[Row]:
    """Yield a row for each search, each with nothing known at its start."""
    exact: list[float] = []
    for name in ("exhaustive", "two-pointer", "modes-fx"):
        counted, started = Counted(evaluate), time.monotonic()
        if name == "modes-fx":
            losses, result = ours(counted, columns, rows, guess)
            violations = f"{len(result.violations)}, at most {max((item.size for item in result.violations), default=0):.1e}"
        else:
            losses = (exhaustive if name == "exhaustive" else two_pointer)(counted, columns, rows)
            violations = falls(counted, columns, rows) if name == "exhaustive" else ""
        row: Row = {"search": name, "grid": f"{columns} x {rows}", "evaluations": counted.evaluations}
        row |= {"seconds": time.monotonic() - started, "violations": violations}
        exact = exact or losses
        row["above the optimum"] = max(loss / best - 1 for loss, best in zip(losses, exact, strict=True))
        yield row | {f"f at {target:.1%}": loss for target, loss in zip(TARGETS, losses, strict=True)}


class Measured:
    """A model's f and g on a grid of its own scores, at one gamma.

    Args:
        options: Of the command line.
        size: Thresholds of each modality.
    """

    def __init__(self, options: argparse.Namespace, size: int) -> None:
        """Load, calibrate and compile the model."""
        self._model, processor = load_any(options.model, dtype=options.dtype)
        if options.data is None:
            batches: Any = make_batches("calibration", options.search_images, processor, 8)
        else:
            batches = list(make_any_batches(load_samples(options.data, limit=8 * options.search_images), processor, 8))
        self._region = optimized(self._model)
        self._region.__enter__()
        self.importance = layer_importance(self._model, batches)
        self._objective = Objective(self._model, batches)
        routing = self._objective.routing_weights()
        scores = [routing.scores(m, [row[m] ** GAMMA for row in self.importance.alpha]) for m in range(2)]
        self.taus_text, self.taus_vision = (score_grid(*of, size) for of in scores)
        predicted = predicted_ratio(scores)
        self.guess: Function = lambda q, p: predicted(self.taus_text[q], self.taus_vision[p])
        self(0, 0)  # compiles

    def __call__(self, q: int, p: int) -> tuple[float, float]:
        """Return (f, g) at one point: a forward over the data."""
        plan = thresholds(self.importance.alpha, GAMMA, self.taus_text[q], self.taus_vision[p])
        found = self._objective.evaluate(plan.bounds(self._objective.num_layers))
        return found.kl, found.skip_ratio


def on_model(options: argparse.Namespace) -> list[Row]:
    """Compare the searches on the model."""
    measured = Measured(options, options.search_grid)
    return list(compared(measured, len(measured.taus_text), len(measured.taus_vision), measured.guess))


def interpolated(options: argparse.Namespace) -> list[Row]:
    """Compare the searches for D = 100, on f and g interpolated from measured points."""
    measured = Measured(options, 100)
    sides = [len(measured.taus_text), len(measured.taus_vision)]
    knots = [sorted({round(i * (side - 1) / (KNOTS - 1)) for i in range(KNOTS)}) for side in sides]
    found = [[measured(q, p) for p in knots[1]] for q in knots[0]]
    ratios = _surface([[g for _, g in row] for row in found], knots, sides)
    losses = _surface([[f**0.5 for f, _ in row] for row in found], knots, sides) ** 2
    return list(compared(lambda q, p: (float(losses[q, p]), float(ratios[q, p])), *sides, measured.guess))


def _surface(values: list[list[float]], knots: list[list[int]], sides: list[int]) -> Tensor:
    """Interpolate values at knots bilinearly to the whole grid, non-decreasing in both indices: float64 [columns, rows]."""
    table = torch.tensor(values, dtype=torch.float64).cummax(0).values.cummax(1).values
    for axis in range(2):
        at, known = torch.arange(sides[axis]), torch.tensor(knots[axis])
        right = torch.searchsorted(known, at).clamp(min=1)
        share = ((at - known[right - 1]) / (known[right] - known[right - 1])).double()
        low, high = table.index_select(axis, right - 1), table.index_select(axis, right)
        table = torch.lerp(low, high, share.view(-1, 1) if axis == 0 else share)
    return table


def one_and_two(options: argparse.Namespace) -> list[Row]:
    """Search with one process and with two over gloo, each with half of the batches."""
    rows = []
    for world in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            torch.multiprocessing.spawn(_process, (world, folder, options), nprocs=world)
            row = torch.load(Path(folder) / "row.pt")
        rows.append({"processes": world, **row, "seconds in all": time.monotonic() - started})
    return rows


def _process(rank: int, world: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    model, processor = load(getattr(torch, options.dtype))
    batches = make_batches("calibration", options.search_images, processor, 8)[rank::world]
    with optimized(model):
        importance: Importance = layer_importance(model, batches)
        plan = search(model, batches, importance, TARGETS, gammas=(GAMMA,), grid_size=8)
    facts = plan.provenance["search"]
    row: Row = {
        "data": plan.provenance["data_hash"],
        "evaluations": facts["evaluations"],
        "seconds of search": facts["seconds"],
    }
    row["sum of layers' KL"] = f"{sum(map(sum, importance.kl)):.9e}"
    row |= {f"f at {point.target:.1%}": f"{point.kl['calibration']:.9e}" for point in plan.points}
    row |= {f"g at {point.target:.1%}": f"{point.realised['calibration']:.9f}" for point in plan.points}
    if rank == 0:
        torch.save(row, Path(folder) / "row.pt")
    dist.destroy_process_group()
