"""The whole way, 200 cases of it: random models, plans and calls against the oracle. `make soak` has them by the thousand."""

import dataclasses
import itertools

import pytest

from tests import soak
from tests.whole.case import CACHES, FAMILIES, REGIONS, RULES, Call, Case, Plan, Stage, pool
from tests.whole.judge import Undecided

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # stock's own: nothing that transformers can be asked is left out here
]
SEED, CASES = 373, 67


@pytest.mark.wide
@pytest.mark.parametrize("third", range(3))
def test_two_hundred_cases_are_answered_as_the_oracle_does(third: int) -> None:
    found = soak.search_cases(pool(SEED)[3 * third : 3 * third + 3], CASES, SEED + third)
    undecided = {why: number for why, number in found.items() if why.startswith("undecided")}
    assert found["decided"] >= 0.75 * CASES, undecided
    assert found["skipped some"] >= 0.3 * found["decided"]


def test_every_family_rule_region_and_cache_is_drawn_for_some_seed() -> None:
    drawn = [stage for seed in range(400) for stage in pool(seed)]
    assert {stage.family for stage in drawn} == set(FAMILIES)
    assert {stage.rule for stage in drawn} == set(RULES)
    assert {(stage.region, stage.cache) for stage in drawn} == {("moe", None), *itertools.product(REGIONS[1:], CACHES)}
    assert pool(SEED) == pool(SEED)


def test_a_case_is_its_text() -> None:
    plan = Plan(0.1, float("inf"), ((0.5, 2.0),), 0.5, (0.0, 0.9), 0.27)
    case = Case(Stage("tiny/mixtral", "bfloat16"), plan, Call(((1, 2, 3),), "right", "generate", "static", 2, 7))
    assert Case.parse(str(case)) == case
    assert Case.parse(str(dataclasses.replace(case, plan=Plan()))).plan == Plan()


def test_a_failure_says_how_to_run_it_again_and_an_undecided_case_is_none() -> None:
    def fails(case: Case) -> tuple[int, int]:
        if case.call.steps > 1:
            raise AssertionError("wrong")
        raise Undecided("alike")

    with pytest.raises(AssertionError, match=r"wrong\nAgain: python -m tests\.soak --case '\{") as error:
        soak.search_cases(pool(SEED), 50, SEED, fails)
    said = str(error.value).partition("--case '")[2].removesuffix("'")
    assert Case.parse(said).call.steps == 2  # the smallest that fails


@pytest.mark.wide
@pytest.mark.usefixtures("without_inductor")
def test_a_minute_of_the_soak_in_seconds() -> None:
    counts = soak.soak(3, SEED, dataclasses.replace(soak.STAGE, inductor=False), every=0.05)
    assert counts["one"] > 0
    assert counts["changes"] >= 2
