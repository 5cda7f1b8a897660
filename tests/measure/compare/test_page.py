"""The page of a comparison, from made-up rows: what it says, and what it says of what is missing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from modes_fx.measure.compare import CONTENDERS, Comparison, Row
from modes_fx.measure.compare.contenders import own_rule, taking_part
from modes_fx.measure.compare.output import write
from modes_fx.measure.page.closeup import Closeup, Picture
from tests.measure.page.reading import Reader, png, read

TARGETS = (0.5, 0.88)
SECTIONS = (
    "Quality", "Speed", "What each part adds", "Layers", "Search for thresholds", "Samples", "All rules", "How it was measured",
)  # fmt: skip
CLOSEUP = Closeup(
    8,
    {"text prefill": (0.25, 0.5), "vision prefill": (0.75, 1.0), "text decode": (0.125, None)},
    (Picture("what is it ?", "a <cat>", "a <cat>", "a dog", (("what", 0.5), ("is", 0.25)), png(), ((0.0, 0.5), (1.0, 0.25))),),
)
RULES = taking_part("prefill")
TRIALS = tuple(
    {"gamma": gamma, "tau_text": text, "tau_vision": vision, "kl": text + vision, "ratio": 0.4 + text}
    for gamma in (0.0, 0.5)
    for text in (0.0, 0.01, 0.2)
    for vision in (0.0, 0.03)
)
CHANGED = {"kl": 0.02, "flips": 0.01, "score": 0.8, "retained": 0.9}
SETTINGS: dict[str, Any] = {"seed": 0, "data_hash": {"test": "abc"}, "versions": {"torch": "2"}, "tolerance": 0.005}


def row(name: str, target: float, place: int) -> Row:
    if name == "naee_top2" and target > 0.875:
        return Row(name, CONTENDERS[name].title, target, "unreachable", 0.875)
    kl, kept = 1e-5 * 4 ** (11 - place) * target, 1 - 0.02 * (11 - place) * target
    return Row(
        name, CONTENDERS[name].title, target, "overshot" if name == "reduce_k" else "reached", 1.0,
        {"calibration": target, "all": target + 0.002, "text": 0.1, "vision": 0.9, "prefill": target + 0.002, "decode": 0.4},
        {"kl": kl, "flips": 0.01, "score": 0.9 * kept, "retained": kept},
        {"kl": (kl / 2, kl * 2), "retained": (kept - 0.01, kept + 0.01)},
        {"prefill": 1.7 + place / 100, "decode": 1.2},
        {"tau_text": 0.01, "tau_vision": 0.03, "gamma": 0.5},
        speed_range={"prefill": (1.5, 2.0), "decode": (1.1, 1.3)},
    )  # fmt: skip


@pytest.fixture
def comparison() -> Comparison:
    rows = tuple(row(name, target, place) for place, name in enumerate(RULES, start=12 - len(RULES)) for target in TARGETS)
    alpha = ((0.75, 0.5), (0.25, 0.5))
    return Comparison(
        {"score": 0.9}, 512, rows, {"fastest": {"prefill": "grouped_mm"}}, "tempered", ("layers.0.mlp", "layers.1.mlp"), alpha,
        {"tempered": TRIALS},
    )  # fmt: skip


def page(tmp_path: Path, closeup: Closeup | None, **comparisons: Comparison) -> Reader:
    return read(write(comparisons, SETTINGS, tmp_path, closeup)[0])


def without(comparison: Comparison, **changes: Any) -> Comparison:
    return replace(comparison, rows=tuple(replace(row, **changes) for row in comparison.rows))


def test_a_whole_comparison_has_every_section(tmp_path: Path, comparison: Comparison) -> None:
    found = page(tmp_path, CLOSEUP, model=comparison)
    places = [found.text.index(name) for name in SECTIONS]
    assert places == sorted(places)
    assert not any(kind == "missing" for _, name, kind in found.attributes if name == "class")
    for said in ("tempered GMLG + DMT", "GMLG + DMT, γ = 1", "text decode", "γ = 0, not chosen", "✗ a dog", "✓ a <cat>"):
        assert said in found.text
    assert "Importance α of each layer, log scale" in found.text


def test_headlines_are_of_the_best_rule_at_the_largest_target(tmp_path: Path, comparison: Comparison) -> None:
    found = page(tmp_path, CLOSEUP, model=comparison)
    start = found.text.index("At 88%, the largest target met")
    said = found.text[start : start + 12]
    assert "With tempered GMLG + DMT, the answers change least of the 12 rules" in said[1]
    for value in ("88.2%", "100.0%", "8.8·10⁻⁶", "1.81×", "1.20×"):
        assert value in said
    assert any("(99.0–101.0%)" in part for part in said)


def test_a_rule_that_cannot_says_how_far_it_gets(tmp_path: Path, comparison: Comparison) -> None:
    found = page(tmp_path, CLOSEUP, model=comparison)
    assert "at most 87.5%" in found.text
    assert "Marked ↑" in found.whole


def test_what_was_not_measured_names_the_option(tmp_path: Path, comparison: Comparison) -> None:
    small = replace(without(comparison, speed={}), alpha=None, trials={}, rows=without(comparison, speed={}).rows[:2])
    found = page(tmp_path, None, model=small)
    for said in ("--speed times", "--rules gmlg, modes or tempered", "--rules tempered, modes or dmt", "lower --targets"):
        assert said in found.whole
    assert "--rules threshold gmlg dmt modes tempered" in found.whole
    assert "decode" not in found.text
    assert set(SECTIONS) <= set(found.text)


def test_nothing_reached_is_a_page_too(tmp_path: Path, comparison: Comparison) -> None:
    none = without(comparison, status="unreachable", largest=0.4, skipped={}, metrics={}, intervals={}, speed={}, point={})
    found = page(tmp_path, None, model=none)
    assert "No target was reached" in found.text
    assert "at most 40.0%" in found.text


def test_a_model_that_answers_nothing_right_has_no_share_of_it(tmp_path: Path, comparison: Comparison) -> None:
    wrong = without(comparison, metrics={"kl": 0.1, "flips": 0.0, "score": 0.0}, intervals={"kl": (0.05, 0.2)})
    found = page(tmp_path, CLOSEUP, model=wrong)
    assert "Score retained, % of the unskipped model's" not in found.text


def test_several_models_are_named_and_shown_singly(tmp_path: Path, comparison: Comparison) -> None:
    found = page(tmp_path, CLOSEUP, **{"runs/seed<0>": comparison, "runs/seed1": without(comparison, metrics=CHANGED)})
    assert "mean of 2 models (seed<0>, seed1)" in found.whole
    assert "Lines are means over 2 models" in found.whole
    assert "tempered GMLG + DMT at 88% of seed<0>" in found.whole


def test_a_speed_that_cannot_be_told_is_left_out(tmp_path: Path, comparison: Comparison) -> None:
    found = page(tmp_path, CLOSEUP, model=without(comparison, speed={"prefill": 1.5, "decode": float("nan")}))
    assert "Prefill, times as fast as stock's fastest" in found.text
    assert "Decoding, times as fast as stock's fastest" not in found.text
    assert "nan" not in found.whole
    assert "grouped_mm" in found.text


def test_decode_steps_are_told_as_such(tmp_path: Path, comparison: Comparison) -> None:
    found = page(tmp_path, None, model=replace(without(comparison, speed={}), phase="decode"))
    for said in ("decode steps that read equally many experts", "--phase prefill", "experts read in", "Skipped are experts"):
        assert said in found.whole
    for said in ("Experts unread", "pairs skipped", "40%"):
        assert said in found.text
    assert "Expert calls skipped" not in found.text


def test_own_rule() -> None:
    assert own_rule(list(CONTENDERS)) == "tempered"
    assert own_rule(["naee", "threshold", "dmt"]) == "dmt"
    assert own_rule(["naee", "diep"]) == "diep"
