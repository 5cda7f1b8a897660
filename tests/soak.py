"""The whole way for longer: drawn cases by the thousand, then a model that several threads ask while its plan changes.

    python -m tests.soak --cases 3000 --minutes 30 --seed 0    # `make soak`; fails on the first wrong answer
    python -m tests.soak --case '{"stage": ...}'               # one case again, as a failure printed it

The cases are those of ``tests/whole``: each seed draws other models, plans and calls. In the second part each answer must be
that of a plan that was in force: within 1e-5 of the largest logit (threads lay out memory otherwise, and sums round otherwise),
where answers of two plans are alike so far or 1e-3 apart. Before it starts, every request is answered under every plan by one
thread alone. Memory is flat if the resident set, once the collector has run, grows by no more than 32 MiB from the end of the
first quarter to the end.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import itertools
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase
from torch import Tensor, nn

import modes_fx
from modes_fx.plan import SkipPlan
from tests import fuzz
from tests.whole.case import Call, Case, Stage, cases, pool
from tests.whole.judge import Undecided
from tests.whole.run import ask, check, inputs_of, optimised

THREADS = 4
EACH = 200
"""Cases on one pool of models."""
GROWTH_MIB = 32
ALIKE, APART = 1e-5, 1e-3
"""Of two answers, relative to the largest logit."""
STAGE = Stage("vision/internvl-qwen3_moe", inductor=True)
"""A model that keeps nothing of a call: some keep the last one's positions, which threads would take from one another."""
PLANS = (
    None,
    *(SkipPlan.uniform(text=text, vision=vision) for text, vision in ((0.25, 0.4), (0.5, 0.1), (9.0, 9.0), (0.0, 9.0))),
)


def search_cases(
    stages: list[Stage], count: int, seed: int, on_case: Callable[[Case], tuple[int, int]] = check
) -> Counter[str]:
    """Run so many cases on some stages.

    Returns:
        How many were ``decided``, how many of these ``skipped some`` pairs and not all, and why others were not.

    Raises:
        AssertionError: One failed, the smallest that was found; says how to run it again.
    """
    found: Counter[str] = Counter()
    failed: list[Case] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @hypothesis.given(cases(stages))
    def one(case: Case) -> None:
        try:
            routed, kept = on_case(case)
        except Undecided as why:
            found[f"undecided: {why}"] += 1
            return
        except Exception:  # hypothesis ends with the smallest
            failed.append(case)
            raise
        found["decided"] += 1
        found["skipped some"] += 0 < kept < routed

    try:
        one()
    except Exception as error:
        raise AssertionError(f"{error}\nAgain: python -m tests.soak --case '{failed[-1]}'") from error
    return found


@dataclass(frozen=True)
class Request:
    """What a thread asks, and its answer under each plan."""

    call: Call
    inputs: dict[str, Any]
    answers: tuple[tuple[Tensor, ...], ...]


def requests(model: nn.Module, stage: Stage, count: int, chance: random.Random) -> list[Request]:
    """Draw requests, and answer each under each plan."""
    drawn = []
    for number in range(count):
        texts = [(chance.randint(1, 4), chance.randint(1, 4)) for _ in range(chance.randint(1, 3))]
        seen = chance.choice((0, 0, 1))
        rows = tuple((before, seen, behind) for before, behind in texts)
        cache = chance.choice(("none", "dynamic", "static"))
        call = Call(rows, "left", chance.choice(("forward", "generate")), cache, chance.randint(0, 3), number)
        if call.way == "forward":  # decode steps would be forwards of their own, which may see another plan
            call = replace(call, steps=0)
        inputs, _ = inputs_of(stage, call)
        answers = []
        for plan in PLANS:
            modes_fx.set_plan(model, plan)
            answers.append(values(model, call, inputs))
        pairs = [distance(one[:1], other[:1]) for one, other in itertools.combinations(answers, 2)]
        assert not any(ALIKE < each <= APART for each in pairs), f"answers of two plans are neither alike nor apart: {call}"
        drawn.append(Request(call, inputs, tuple(answers)))
    return drawn


def values(model: nn.Module, call: Call, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return the logits of each forward of a call; those of padding are nobody's answer."""
    found = ask(model, call, inputs, torch.float32).logits
    real = inputs["attention_mask"] == 1
    return tuple(each[real] if each.shape[:2] == real.shape else each[:, 0] for each in found)


class Plans:
    """The plan in force, changed every second.

    Attributes:
        turn: Twice the number of changes begun, less one while one is under way: who reads it before and after a request knows
            which plans may have answered.
    """

    def __init__(self, model: nn.Module, chance: random.Random) -> None:
        self.model, self.turn = model, 0
        self.order = [chance.randrange(len(PLANS)) for _ in range(100_000)]
        modes_fx.set_plan(model, PLANS[self.order[0]])

    def change(self) -> None:
        self.turn += 1
        modes_fx.set_plan(self.model, PLANS[self.order[(self.turn + 1) // 2]])
        self.turn += 1

    def between(self, before: int, after: int) -> set[int]:
        """Return the plans that may have been in force from one turn to another."""
        return set(self.order[before // 2 : (after + 1) // 2 + 1])


def judge(found: tuple[Tensor, ...], request: Request, candidates: set[int]) -> str:
    """Return what an answer is: of ``one`` plan, or, of a ``generate`` that a change came into, ``spanned``.

    Each forward takes one plan as a whole. Those behind the change go on from what the ones in front left in the cache, so that
    of such an answer the first forward alone can be compared.

    Raises:
        AssertionError: It is that of no plan that was in force.
    """
    answers = [request.answers[plan] for plan in candidates]
    if any(len(found) == len(answer) and distance(found, answer) <= ALIKE for answer in answers):
        return "one"
    may_span = request.call.way == "generate" and len(candidates) > 1
    first = min(distance(found[:1], answer[:1]) for answer in answers)
    spanned = may_span and first <= ALIKE
    assert spanned, f"no answer of {sorted(candidates)}, off by {first:.2g}: {request.call}"
    return "spanned"


def distance(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> float:
    """Return the largest difference of two answers of as many forwards, relative to the largest logit."""
    return max(float((mine - its).abs().max() / its.abs().max()) for mine, its in zip(one, other, strict=True))


def resident_mib() -> float:
    """Return the resident set, without what can be given back."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def soak(
    seconds: float, seed: int, stage: Stage = STAGE, tell: Callable[[str], object] = lambda line: None, every: float = 1
) -> Counter[str]:
    """Ask one model from several threads while its plan changes, every second if nothing else is said.

    It ends after ``seconds``, but not before the plan changed twice and, once it stays as it is, an answer was of one plan:
    however busy the machine.

    Returns:
        How many answers were of ``one`` plan or ``spanned`` a change, how many ``changes`` there were, and ``graphs made
        again`` (torch's guards fail now and then where other threads run; see ``attach.regions``).

    Raises:
        AssertionError: An answer belongs to no plan, changes of the plan compile graphs, or memory grew.
    """
    chance, model = random.Random(seed), optimised(stage)
    asked = requests(model, stage, 24, chance)
    plans, counts, errors = Plans(model, chance), Counter[str](), list[BaseException]()
    graphs, done, lock = modes_fx.report(model).graphs, threading.Event(), threading.Lock()

    def work(draw: random.Random) -> None:
        try:
            while not done.is_set():
                request, before = draw.choice(asked), plans.turn
                found = values(model, request.call, request.inputs)
                kind = judge(found, request, plans.between(before, plans.turn))
                with lock:
                    counts[kind] += 1
        except BaseException as error:
            errors.append(error)
            done.set()

    threads = [threading.Thread(target=work, args=(random.Random(f"{seed} {number}"),)) for number in range(THREADS)]
    began, memory = time.monotonic(), list[tuple[float, float]]()
    for thread in threads:
        thread.start()
    while not done.wait(every):
        passed = time.monotonic() - began
        if passed >= seconds and counts["changes"] >= 2:
            break
        plans.change()
        counts["changes"] += 1
        if passed >= len(memory) * seconds / 12:
            memory.append((passed, resident_mib()))
            tell(f"{passed:.0f} s: {memory[-1][1]:.0f} MiB, {counts['one']} answers of one plan, {counts['changes']} changes")
    while not counts["one"] and not done.wait(every):
        pass
    done.set()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    again = counts["graphs made again"] = modes_fx.report(model).graphs - graphs
    assert again <= 2 + counts["changes"] / 10, f"{again} graphs were made again: more than guards that fail for other threads"
    settled = next((mib for passed, mib in memory if passed >= seconds / 4), memory[-1][1])
    assert resident_mib() - settled <= GROWTH_MIB, f"memory grew from {settled:.0f} MiB: {memory}"
    return counts


def main() -> None:
    """Run both parts, or one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=30, help="of the second part")
    parser.add_argument("--seed", type=int, help="none draws one")
    parser.add_argument("--case", type=Case.parse, help="run this one alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.case is not None:
        routed, kept = check(given.case)
        sys.stdout.write(f"as the oracle: {kept} of {routed} pairs kept\n")
        return

    def tell(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    first = random.randrange(2**32) if given.seed is None else given.seed
    with fuzz.quiet():
        for number in range(-(-given.cases // EACH)):
            count, started = min(EACH, given.cases - number * EACH), time.monotonic()
            found = search_cases(pool(first + number), count, first + number)
            others = sum(found.values()) - found["decided"] - found["skipped some"]
            tell(
                f"seed {first + number}: {found['decided']} cases as the oracle, {found['skipped some']} of which skip some; "
                f"{others} undecided, {time.monotonic() - started:.0f} s"
            )
        if given.minutes:
            counts = soak(given.minutes * 60, first, tell=tell)
            tell(", ".join(f"{name}: {number}" for name, number in sorted(counts.items())))


if __name__ == "__main__":
    main()
