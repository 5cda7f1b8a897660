"""Small data in the layouts of the hub's repositories."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image


def picture(number: int, size: tuple[int, int] = (12, 8)) -> Image.Image:
    """Noise, so that its file is long enough to be cut."""
    noise = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def cut_png(number: int) -> bytes:
    return png(number)[:-60]


def shows(image: Any, number: int) -> bool:
    return image.mode == "RGB" and image.tobytes() == picture(number).tobytes()


def to_parquet(path: Path, rows: dict[str, list[Any]], images: str | None = None) -> None:
    """Write parquet as `push_to_hub` does: images as {bytes, path}, with the features in the file's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict(rows)
    if table.features.get("answer") == datasets.List(datasets.Value("null")):
        table = table.cast_column("answer", datasets.List(datasets.Value("string")))
    if images:
        image = datasets.Image(decode=False)
        listed = isinstance(rows[images][0], list)
        table = table.cast_column(images, datasets.List(image) if listed else image)
        table = table.cast_column(images, datasets.List(datasets.Image()) if listed else datasets.Image())
    table.to_parquet(str(path))


def stored(data: bytes, name: str = "x.png") -> dict[str, Any]:
    return {"bytes": data, "path": name}


def gqa(
    root: Path, *, questions: int = 6, pictures: int = 3, split: str = "testdev_balanced", broken: tuple[int, ...] = ()
) -> Path:
    """Question i is about picture i % pictures; picture files 1 and 2, question files 1 and 2."""
    half = questions // 2
    for part, numbers in enumerate((range(half), range(half, questions))):
        rows = {
            "id": [f"2{number:05}" for number in numbers],
            "imageId": [f"n{number % pictures}" for number in numbers],
            "question": [f"What is in picture {number % pictures}?" for number in numbers],
            "answer": ["cat" for _ in numbers],
            "fullAnswer": [f"It is cat number {number}." for number in numbers],
            "isBalanced": [True for _ in numbers],
        }
        to_parquet(root / f"{split}_instructions" / f"testdev-{part:05}-of-00002.parquet", rows)
    for part in range(2):
        numbers = range(part, pictures, 2)
        rows = {
            "id": [f"n{number}" for number in numbers],
            "image": [stored(cut_png(number) if number in broken else png(number), f"n{number}.jpg") for number in numbers],
        }
        to_parquet(root / f"{split}_images" / f"testdev-{part:05}-of-00002.parquet", rows, "image")
    return root


def coco(root: Path, *, count: int = 4) -> Path:
    for split in ("val", "test"):
        rows = {
            "question_id": [f"{number:012}.jpg" for number in range(count)],
            "image": [stored(png(number)) for number in range(count)],
            "question": ["Please carefully observe the image and come up with a caption for the image"] * count,
            "answer": [[f"Cat {number}.", "A cat."] if split == "val" else [] for number in range(count)],
            "id": list(range(count)),
            "coco_url": ["http://images"] * count,
            "height": [8] * count,
        }
        to_parquet(root / "data" / f"{split}-00000-of-00001.parquet", rows, "image")
    return root


def videommmu(root: Path, *, frames: int = 12) -> Path:
    """One video with frames 0.png, 1.png, ... asked about in three tracks, and one without frames."""
    options = ["A minor", "B flat", "C major"]
    for track in ("Adaptation", "Comprehension", "Perception"):
        rows: dict[str, list[Any]] = {
            "id": ["dev_Music_1"],
            "question": [f"Which key ({track})?"],
            "options": [options],
            "answer": ["C"],
            "question_type": ["multiple-choice"],
        }
        if track == "Adaptation":
            rows = {key: value * 2 for key, value in rows.items()}
            rows["answer"], rows["options"] = ["C", "4.5"], [options, []]
            rows["image"] = [stored(png(99)), None]
        to_parquet(root / track / "test-00000-of-00001.parquet", rows, "image" if "image" in rows else None)
    folder = root / "Art" / "dev_Music_1"
    folder.mkdir(parents=True)
    for number in range(frames):
        (folder / f"frame_{number}.png").write_bytes(png(number))
    (folder / "notes.txt").write_text("no frame")
    return root


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
