"""Drawings inside a page: they take its colours, tell apart what they draw, and need nothing outside."""

import math
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modes_fx.measure.page import charts
from modes_fx.measure.page.document import section, write_page
from modes_fx.measure.page.figures import Drawing, figures
from modes_fx.measure.page.lines import Line, _styles, draw_lines, factor, logarithmic, retained, spread
from modes_fx.measure.page.markup import short
from tests.measure.page.reading import Reader, read

RATIOS = (0.5, 0.75, 0.875)
RULES = [Line(f"rule {index}", RATIOS, (0.9, 0.8 - index / 20, math.nan), ((0.8, 0.95),) * 3) for index in range(11)]
TRIALS = [
    {"gamma": gamma, "tau_text": text, "tau_vision": vision, "kl": (text + vision) * 3, "ratio": text + vision}
    for gamma in (0.5, 1.0)
    for text in (0.0, 0.001, 0.3)
    for vision in (0.0, 0.02, 0.4)
]
CHOSEN = [{"target": 0.3, "gamma": 0.5, "tau_text": 0.3, "tau_vision": 0.0}]


def page(tmp_path: Path, *drawings: Drawing) -> Reader:
    return read(write_page(tmp_path / "page.html", "A <title>", "Below & it", [section("Drawn", figures(drawings))]))


@pytest.mark.parametrize("scale", [logarithmic, retained, factor])
def test_every_line_is_named_where_it_ends(tmp_path: Path, scale: Any) -> None:
    own = Line("ours", RATIOS, (0.99, 0.98, 0.97), ((0.9, 1.0),) * 3, ((0.5, 0.98), (0.5, 1.0)), own=True)
    found = page(tmp_path, Drawing("Lines", draw_lines([*RULES, own], scale, (1.0, "stock")), "Higher is better."))
    for line in (*RULES, own):
        assert found.text.count(line.name) == 1
    assert {"A <title>", "Below & it", "Drawn", "Lines", "Higher is better.", "stock", "50%"} <= set(found.text)


def test_no_two_lines_look_alike() -> None:
    looks = _styles([*RULES, Line("ours", RATIOS, RATIOS, own=True)])
    assert len(set(looks.values())) == len(RULES) + 1


@given(st.lists(st.floats(0, 1), max_size=12))
def test_labels_are_spread_in_their_order(places: list[float]) -> None:
    gap = 0.06
    found = spread(places, gap)
    ordered = sorted(found)
    assert all(high - low >= gap - 1e-9 for low, high in pairwise(ordered))
    assert max(found, default=0) <= 1
    assert [places[i] for i in sorted(range(len(places)), key=found.__getitem__)] == sorted(places)


def test_a_frontier_holds_what_nothing_beats() -> None:
    rows = [{"ratio": r, "kl": k} for r, k in ((0.1, 0.5), (0.2, 0.3), (0.3, 0.3), (0.5, 0.9), (0.4, 0.95))]
    assert charts.unbeaten(rows) == [{"ratio": 0.3, "kl": 0.3}, {"ratio": 0.5, "kl": 0.9}]


DRAWINGS: dict[str, Callable[[], list[Drawing]]] = {
    "alpha": lambda: [charts.alpha([(0.7, 0.999), (0.3, 0.0)], ["layers.3.experts", "layers.7.experts"])],
    "alpha of zeros": lambda: [charts.alpha([(0.0, 0.0)], ["experts"])],
    "heat map": lambda: [charts.skipping({"text": (0.1, None), "vision": (0.9, 1.0)}, ["a", "b"], "Said.")],
    "heat map of many layers": lambda: [charts.skipping({"text": (0.5,) * 60}, [str(i) for i in range(60)])],
    "planes": lambda: charts.planes(TRIALS, CHOSEN),
    "planes without trials": lambda: charts.planes([], CHOSEN),
    "frontier": lambda: [charts.frontier(TRIALS, CHOSEN)],
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_charts_are_drawn_in_the_pages_colours(tmp_path: Path, name: str) -> None:
    found = page(tmp_path, *DRAWINGS[name]())
    styles = " ".join(value for _, attribute, value in found.attributes if attribute == "style" and value)
    assert "var(--" in styles
    assert not any(f"#0{digit}0{digit}0{digit}" in styles for digit in range(1, 8))
    if name == "alpha":
        assert {"3", "7", "text", "vision"} <= set(found.text)
    if name == "heat map":
        assert {"10", "–", "90", "100", "Said."} <= set(found.text)
    if name == "planes":
        assert {"γ = 0.5", "γ = 1, not chosen", "30%"} <= set(found.text)


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    page(tmp_path, *DRAWINGS["alpha"]())
    assert dict(matplotlib.rcParams) == before


def test_a_page_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "they need matplotlib (pip install 'modes-fx[viz]')" in page(tmp_path, *DRAWINGS["alpha"]()).whole


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0, "0"), (0.01234, "0.0123"), (4.68e-6, "4.7·10⁻⁶"), (12345, "12,345"), (1.0, "1")]
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert short(value) == text
