"""Each layout is recognised, and gives the questions, answers and pixels that were written."""

import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from modes_fx.data import FORMATS, load_samples
from modes_fx.errors import CalibrationError
from tests.data import layouts
from tests.data.layouts import picture, png, shows, stored, to_parquet


def test_gqa_joins_questions_and_images_by_image_id(tmp_path: Path) -> None:
    samples = load_samples(layouts.gqa(tmp_path / "GQA"), limit=None)
    assert samples.report.format == "gqa"
    assert [sample.id for sample in samples] == [f"2{number:05}" for number in range(6)]
    for number, sample in enumerate(samples):
        assert (sample.question, sample.answer) == (f"What is in picture {number % 3}?", f"It is cat number {number}.")
        assert [shows(image, number % 3) for image in sample.open_images()] == [True]


def test_gqa_reads_the_chosen_images_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: read.append(load(*args, **kwargs)) or read[-1])
    samples = load_samples(layouts.gqa(tmp_path / "GQA"), limit=1)
    questions, names, images = read
    assert (len(questions), len(names), len(images), len(samples)) == (6, 3, 1, 1)
    assert names.column_names == ["id"]


def test_gqa_with_several_splits_wants_one_named(tmp_path: Path) -> None:
    root = layouts.gqa(layouts.gqa(tmp_path / "GQA"), split="train_balanced", questions=2)
    with pytest.raises(CalibrationError, match=r"several splits. Pass one of: testdev_balanced, train_balanced"):
        load_samples(root)
    assert len(load_samples(root, split="train_balanced")) == 2
    with pytest.raises(CalibrationError, match="no split 'val'"):
        load_samples(root, split="val")


def test_gqa_falls_back_on_the_short_answer(tmp_path: Path) -> None:
    root = layouts.gqa(tmp_path / "GQA", questions=2)
    rows = {"id": ["1"], "imageId": ["n0"], "question": ["What?"], "answer": ["cat"], "fullAnswer": [None]}
    for file in (root / "testdev_balanced_instructions").iterdir():
        to_parquet(file, rows)
    assert {sample.answer for sample in load_samples(root)} == {"cat"}


@pytest.mark.parametrize("name", ["n9", None])
def test_gqa_without_any_image_of_its_questions_is_refused(tmp_path: Path, name: str | None) -> None:
    root = layouts.gqa(tmp_path / "GQA")
    rows = {"id": ["1"], "imageId": [name], "question": ["What?"], "answer": ["cat"], "fullAnswer": ["A cat."]}
    for file in (root / "testdev_balanced_instructions").iterdir():
        to_parquet(file, rows)
    with pytest.raises(CalibrationError, match=f"there is no image {name!r}"):
        load_samples(root)


@pytest.mark.parametrize("split", ["val", "validation"])
def test_coco_takes_the_first_caption(tmp_path: Path, split: str) -> None:
    samples = load_samples(layouts.coco(tmp_path / "COCO-Caption2017"), split=split)
    assert samples.report.format == "coco"
    assert [sample.answer for sample in samples] == [f"Cat {number}." for number in range(4)]
    assert {sample.question for sample in samples} == {"Provide a one-sentence caption for the provided image."}
    assert [sample.id for sample in samples][:2] == ["000000000000.jpg", "000000000001.jpg"]
    assert all(shows(sample.open_images()[0], number) for number, sample in enumerate(samples))


def test_coco_has_no_captions_in_its_test_split(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"0 samples of 4 chosen from 4 .*4 x no answer"):
        load_samples(layouts.coco(tmp_path / "COCO-Caption"), split="test")


def test_videommmu_takes_frames_in_order_and_the_options_text(tmp_path: Path) -> None:
    samples = load_samples(layouts.videommmu(tmp_path / "VideoMMMU"))
    assert samples.report.format == "videommmu"
    assert [(sample.id, sample.answer) for sample in samples] == [
        ("Adaptation/dev_Music_1", "C major"),
        ("Adaptation/dev_Music_1", "4.5"),
        ("Comprehension/dev_Music_1", "C major"),
        ("Perception/dev_Music_1", "C major"),
    ]
    assert [sample.question for sample in samples][2] == "Which key (Comprehension)?"
    images = samples[0].open_images()
    assert [shows(image, number) for image, number in zip(images, [*range(12), 99], strict=True)] == [True] * 13
    assert len(samples[1].images) == len(samples[2].images) == 12


def test_videommmu_spaces_frames_evenly(tmp_path: Path) -> None:
    samples = load_samples(layouts.videommmu(tmp_path / "VideoMMMU"), split="Perception", frames=4)
    images = samples[0].open_images()
    assert [shows(image, number) for image, number in zip(images, [0, 4, 7, 11], strict=True)] == [True] * 4
    assert len(load_samples(tmp_path / "VideoMMMU", split="Perception", frames=1)[0].images) == 1


def test_videommmu_without_frames_says_so(tmp_path: Path) -> None:
    root = layouts.videommmu(tmp_path / "VideoMMMU")
    (root / "Art" / "dev_Music_1").rename(root / "Art" / "dev_Music_2")
    with pytest.raises(CalibrationError, match="extract the frames of its video"):
        load_samples(root)


ROWS = {"image": [stored(png(0)), stored(png(1))], "question": ["Q0?", "Q1?"], "answer": ["a0", "a1"]}


def _saved(root: Path, rows: dict[str, list[Any]]) -> datasets.Dataset:
    table = datasets.Dataset.from_dict(rows)
    return table.cast_column("image", datasets.Image()) if "image" in rows else table


def test_a_folder_that_save_to_disk_wrote(tmp_path: Path) -> None:
    _saved(tmp_path, ROWS).select([1, 0]).save_to_disk(str(tmp_path / "saved"))
    samples = load_samples(tmp_path / "saved")
    assert samples.report.format == "datasets"
    assert [(sample.id, sample.question, sample.answer) for sample in samples] == [("0", "Q1?", "a1"), ("1", "Q0?", "a0")]
    assert shows(samples[0].open_images()[0], 1)


def test_a_saved_dataset_dict_wants_a_split(tmp_path: Path) -> None:
    table = _saved(tmp_path, ROWS)
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(CalibrationError, match=r"several splits. Pass one of: test, train"):
        load_samples(tmp_path / "saved")
    assert len(load_samples(tmp_path / "saved", split="test")) == 1


def test_a_folder_of_parquet_with_lists_of_images_and_of_answers(tmp_path: Path) -> None:
    rows = {
        "images": [[stored(png(0)), stored(png(1))], [stored(png(2))]],
        "prompt": ["Compare.", "Describe."],
        "answers": [["", "same"], ["a cat"]],
    }
    to_parquet(tmp_path / "pairs" / "train.parquet", rows, "images")
    samples = load_samples(tmp_path / "pairs")
    assert [(sample.question, sample.answer) for sample in samples] == [("Compare.", "same"), ("Describe.", "a cat")]
    assert [shows(image, number) for number, image in enumerate(samples[0].open_images())] == [True, True]
    assert shows(samples[1].open_images()[0], 2)


def test_a_folder_of_jsonl_with_paths(tmp_path: Path) -> None:
    layouts.jsonl(tmp_path / "set" / "train.jsonl", [{"id": 7, "image": "a.png", "question": "Q?", "answer": 3}])
    picture(5).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "set" / "a.png")
    samples = load_samples(tmp_path / "set" / "train.jsonl")
    assert (samples[0].id, samples[0].answer) == ("7", "3")
    assert shows(samples[0].open_images()[0], 5)
    (tmp_path / "text").mkdir()
    layouts.jsonl(tmp_path / "text" / "train.jsonl", [{"question": "Q?", "answer": "yes"}])
    assert load_samples(tmp_path / "text")[0].images == ()


def test_jsonl_of_pairs_of_images_and_of_text_alone(tmp_path: Path) -> None:
    for number in range(2):
        picture(number).save(tmp_path / f"{number}.png")
    rows = [
        {"images": ["0.png", "1.png"], "question": " Which? ", "answer": " the first\n"},
        {"question": "2 + 2?", "answer": ["4", "four"]},
    ]
    samples = load_samples(layouts.jsonl(tmp_path / "mixed.jsonl", rows))
    assert samples.report.format == "jsonl"
    assert [(sample.id, sample.question, sample.answer) for sample in samples] == [
        ("1", "Which?", "the first"),
        ("2", "2 + 2?", "4"),
    ]
    assert [shows(image, number) for number, image in enumerate(samples[0].open_images())] == [True, True]
    assert samples[1].images == ()


@pytest.mark.parametrize(
    ("text", "match"),
    [("{\n", "Line 2 of .* is not JSON"), ("3\n", "Line 2 of .* is no object, but int"), ("\udcff", "Cannot read")],
)
def test_a_malformed_line_is_named(tmp_path: Path, text: str, match: str) -> None:
    path = layouts.jsonl(tmp_path / "bad.jsonl", [{"question": "Q?", "answer": "a"}])
    path.write_bytes(path.read_bytes() + text.encode(errors="surrogateescape"))
    with pytest.raises(CalibrationError, match=match):
        load_samples(path)


def test_the_format_can_be_told(tmp_path: Path) -> None:
    root = layouts.coco(tmp_path / "COCO-Caption")
    samples = load_samples(root, format="datasets", split="validation")
    assert samples.report.format == "datasets"
    assert samples[0].question.startswith("Please carefully")


@pytest.mark.parametrize(
    ("format", "match"),
    [
        ("parquet", f"Unknown data format 'parquet'; known: {', '.join(FORMATS)}"),
        ("gqa", "lacks the files"),
        (None, "cannot read"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path: Path, format: str | None, match: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match=match):
        load_samples(tmp_path / "empty", format=format)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    to_parquet(tmp_path / "set" / "train.parquet", {"text": ["a"], "answer": ["b"]})
    with pytest.raises(CalibrationError, match="has the columns text, answer; needed are one of question, prompt"):
        load_samples(tmp_path / "set")


def test_a_broken_table_is_refused(tmp_path: Path) -> None:
    root = layouts.gqa(tmp_path / "GQA")
    file = root / "testdev_balanced_instructions" / "testdev-00000-of-00002.parquet"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(CalibrationError, match=r"Cannot read .*testdev-00000-of-00002.parquet"):
        load_samples(root)


def test_without_datasets_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = layouts.gqa(tmp_path / "GQA")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"pip install 'modes-fx\[data\]'"):
        load_samples(root)


@pytest.mark.parametrize("source", ["nowhere", "file.txt"])
def test_no_data_is_refused(tmp_path: Path, source: str) -> None:
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(CalibrationError, match=r"no calibration data at|Cannot tell the format"):
        load_samples(tmp_path / source)


def test_the_folder_of_a_jsonl_file_and_its_images_is_that_file(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    (tmp_path / "questions.jsonl").write_text('{"image": "cat.png", "question": "What is it?", "answer": "a cat"}\n')
    (sample,) = load_samples(tmp_path)
    assert (sample.question, sample.answer, len(sample.open_images())) == ("What is it?", "a cat", 1)


def test_separators_inside_of_strings_are_no_ends_of_lines(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"question": "one\u2028two", "answer": "a"}\n\n{"question": "q", "answer": "b"}\n')
    first, second = load_samples(tmp_path / "data.jsonl")
    assert (first.question, first.id, second.id) == ("one\u2028two", "1", "3")
