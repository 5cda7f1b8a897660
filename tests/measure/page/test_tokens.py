"""Pictures with tokens coloured by how many experts they keep."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import modes_fx
from modes_fx import demo
from modes_fx.data import Sample
from modes_fx.measure.page import tokens
from modes_fx.measure.page.closeup import PICTURES, Closeup, Picture, choose, grid_of, look_closely
from modes_fx.measure.page.document import section, write_page
from modes_fx.plan import SkipPlan
from tests.measure.page.reading import Reader, png, read

QUESTION = "is <b>&amp; \"7\" 'red' ?"
PICTURE = Picture(QUESTION, "yes", "yes", "<no>", (("is", 0.5), ("<b>", 0.25)), png(), ((0.0, 0.125), (0.25, 0.5)))


def page(tmp_path: Path, *pictures: Picture) -> Reader:
    made = tokens.pictures(Closeup(8, {}, pictures))
    return read(write_page(tmp_path / "page.html", "Title", "Subtitle", [section("Samples", made)]))


def test_cards_hold_what_is_known_and_escape_it(tmp_path: Path) -> None:
    found = page(tmp_path, PICTURE, PICTURE)
    content = (tmp_path / "page.html").read_text()
    assert "<b>" not in content
    assert "<no>" not in content
    assert {"is", "<b>", "✓ yes", "✗ <no>", "4 of 8", "4.00", "1.00"} <= set(found.text)
    assert len(re.findall(r"<rect ", content)) == 8


def test_a_question_without_known_words_stands_as_asked(tmp_path: Path) -> None:
    assert QUESTION in page(tmp_path, replace(PICTURE, words=())).text


@pytest.mark.parametrize(
    ("picture", "note"),
    [
        (replace(PICTURE, grid=()), tokens.NO_GRID),
        (replace(PICTURE, grid=(), image=None), tokens.NO_IMAGES),
        (replace(PICTURE, grid=((0.0,),)), tokens.NONE_KEPT),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, picture: Picture, note: str) -> None:
    assert note in page(tmp_path, picture).text


def test_no_pictures_no_section(tmp_path: Path) -> None:
    assert "Samples" not in page(tmp_path).text


def test_grids_follow_the_processor() -> None:
    shares = [index / 8 for index in range(8)]
    assert grid_of(torch.tensor([[1, 4, 8]]), shares) == (tuple(shares[:4]), tuple(shares[4:]))  # 2 x 2 patches a token
    assert grid_of(torch.tensor([[1, 2, 2], [1, 2, 2]]), shares) == (tuple(shares[:2]), tuple(shares[2:4]))  # the first image
    assert grid_of(torch.tensor([[1, 3, 4]]), shares) == ()
    assert grid_of(None, shares) == ()
    assert grid_of(torch.tensor([[1, 4, 8]]), []) == ()


def test_samples_are_chosen_evenly_among_those_with_images() -> None:
    image = Image.new("RGB", (4, 4))
    seeing = [Sample(str(index), "q", "a", (image,)) for index in range(40)]
    blind = [Sample("blind", "q", "a")]
    assert [sample.id for sample in choose([*blind, *seeing])] == [str(5 * index) for index in range(PICTURES)]
    assert choose(blind) == blind


@pytest.mark.usefixtures("without_inductor")
def test_a_close_look_counts_what_each_token_keeps() -> None:
    model, processor = demo.load()
    samples = demo.make_samples("test", 1, questions_per_image=2)
    test = [demo.collate(samples, processor)]
    plan = SkipPlan.reduce_k(2)  # of 8: every token keeps a quarter, text or vision
    modes_fx.optimize(model, plan)
    found = look_closely(model, plan, processor, test, demo.as_data(samples))
    assert found.top_k == 8
    assert set(found.by_layer) == {"text prefill", "vision prefill", "text decode"}
    assert all(ratio == 0.75 for ratios in found.by_layer.values() for ratio in ratios)
    for picture, sample in zip(found.pictures, samples, strict=True):
        assert "".join(word for word, _ in picture.words).replace(" ", "") == sample.question.replace(" ", "")
        assert {share for _, share in picture.words} == {0.25}
        assert len(picture.grid) == 8
        assert {share for row in picture.grid for share in row} == {0.25}
        assert picture.image is not None
        assert picture.image.startswith(b"\x89PNG")
        assert picture.unskipped
    assert modes_fx.report(model).rewritten
