"""Which samples are picked, and what is done about those that cannot be used."""

import logging
from pathlib import Path
from typing import Any

import pytest

from modes_fx.data import Sample, Samples, load_samples
from modes_fx.errors import CalibrationError
from tests.data import layouts
from tests.data.layouts import cut_png, jsonl, picture, png


def numbered(path: Path, count: int) -> Path:
    return jsonl(path / "numbered.jsonl", [{"question": f"Q{number}?", "answer": str(number)} for number in range(count)])


def test_equal_seeds_pick_equal_samples_and_others_do_not(tmp_path: Path) -> None:
    source = numbered(tmp_path, 50)
    picked = [[sample.answer for sample in load_samples(source, limit=10, seed=seed)] for seed in (0, 0, 1)]
    assert picked[0] == picked[1] != picked[2]
    assert all(len(set(answers)) == 10 and answers == sorted(answers, key=int) for answers in picked)


@pytest.mark.parametrize("limit", [None, 7, 100])
def test_a_limit_that_covers_everything_takes_everything(tmp_path: Path, limit: int | None) -> None:
    samples = load_samples(numbered(tmp_path, 7), limit=limit)
    assert [sample.answer for sample in samples] == list("0123456")
    assert (samples.report.found, samples.report.chosen, samples.report.kept) == (7, 7, 7)


def test_samples_are_a_sequence(tmp_path: Path) -> None:
    samples = load_samples(numbered(tmp_path, 5))
    assert isinstance(samples, Samples)
    assert [sample.answer for sample in samples[1::2]] == ["1", "3"]
    assert isinstance(samples[-1], Sample)


def test_some_samples_can_be_held_back_evenly(tmp_path: Path) -> None:
    samples = load_samples(numbered(tmp_path, 11))
    kept, held = samples.held_back(0.2)
    assert [sample.answer for sample in held] == ["4", "9"]
    assert [sample.answer for sample in kept] == ["0", "1", "2", "3", "5", "6", "7", "8", "10"]
    assert held.report is kept.report is samples.report
    assert [len(part) for part in samples.held_back(0.3)] == [8, 3]
    assert [len(part) for part in samples.held_back(0.5)] == [6, 5]
    assert [len(part) for part in samples.held_back(0.01)] == [11, 0]


def rows_with_faults(folder: Path) -> list[dict[str, Any]]:
    """Of ten samples four cannot be used."""
    for number in range(8):
        (folder / f"{number}.png").write_bytes(cut_png(number) if number == 1 else png(number))
    rows: list[dict[str, Any]] = [{"image": f"{number}.png", "question": "What?", "answer": "a cat"} for number in range(9)]
    rows[3]["answer"], rows[5]["question"] = "  ", None
    return [*rows, {"question": "2 + 2?", "answer": 4}]


def test_what_cannot_be_used_is_left_out_counted_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = jsonl(tmp_path / "faults.jsonl", rows_with_faults(tmp_path))
    with caplog.at_level(logging.WARNING, "modes_fx"):
        samples = load_samples(source, max_bad=0.4)
    assert [sample.id for sample in samples] == ["1", "3", "5", "7", "8", "10"]
    report = samples.report
    assert dict(report.bad) == {"unreadable image": 2, "no answer": 1, "no question": 1}
    assert (report.found, report.chosen, report.kept) == (10, 10, 6)
    assert len(report.examples) == 3
    assert report.examples[0].startswith("2: Cannot open the image:")
    assert str(report) in caplog.text


def test_too_many_of_them_are_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "faults.jsonl", rows_with_faults(tmp_path))
    with pytest.raises(
        CalibrationError, match=r"6 samples of 10 chosen .* 2 x unreadable image.*larger share .* max_bad\) than 0.3"
    ):
        load_samples(source, max_bad=0.3)


def test_nothing_usable_is_refused_whatever_the_share(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="0 samples of 1"):
        load_samples(jsonl(tmp_path / "none.jsonl", [{"question": "Q?"}]), max_bad=1)
    with pytest.raises(CalibrationError, match="0 samples of 0"):
        load_samples(jsonl(tmp_path / "empty.jsonl", []), max_bad=1)


def test_broken_and_missing_images_of_a_table_are_found(tmp_path: Path) -> None:
    root = layouts.gqa(tmp_path / "GQA", broken=(1,))
    samples = load_samples(root, max_bad=0.5)
    assert dict(samples.report.bad) == {"unreadable image": 2}
    for file in (root / "testdev_balanced_images").glob("*00001-of*"):
        file.unlink()
    samples = load_samples(root, max_bad=0.5)
    assert dict(samples.report.bad) == {"unreadable image": 2}
    assert "there is no image 'n1'" in samples.report.examples[0]


def test_images_come_upright_and_in_rgb(tmp_path: Path) -> None:
    image = picture(0, size=(6, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # stored lying on its side
    image.save(tmp_path / "turned.png", exif=exif)
    image.convert("L").save(tmp_path / "grey.png")
    rows = [{"image": name, "question": "Q?", "answer": "a"} for name in ("turned.png", "grey.png")]
    turned, grey = (sample.open_images()[0] for sample in load_samples(jsonl(tmp_path / "two.jsonl", rows)))
    assert (turned.size, grey.size, grey.mode) == ((4, 6), (6, 4), "RGB")


@pytest.mark.parametrize("argument", ["limit", "frames"])
def test_arguments_out_of_range_are_refused(tmp_path: Path, argument: str) -> None:
    with pytest.raises(CalibrationError, match=f"{argument} must be at least 1"):
        load_samples(numbered(tmp_path, 1), **{argument: 0})


def test_a_file_of_lines_has_no_split(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no splits"):
        load_samples(numbered(tmp_path, 1), split="train")
