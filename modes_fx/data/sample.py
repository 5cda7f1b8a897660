"""One question with its images and its answer, and how its images are opened."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from modes_fx.errors import CalibrationError

ImageSource = Image.Image | Path | Callable[[], bytes]
"""An image at hand, its file, or a function that returns its file's bytes."""


@dataclass(frozen=True)
class Sample:
    """One question to calibrate on.

    Attributes:
        id: Name in messages.
        question: What the user asks.
        answer: What the assistant should say, without space around it.
        images: In the order in which the user shows them, before the question; none for text alone.
    """

    id: str
    question: str
    answer: str
    images: tuple[ImageSource, ...] = ()

    def open_images(self) -> list[Image.Image]:
        """Return all images, decoded, in RGB.

        Raises:
            CalibrationError: An image is missing or broken.
        """
        return [_open(image) for image in self.images]


def _open(source: ImageSource) -> Image.Image:
    try:
        if isinstance(source, Image.Image):
            image = source
        elif isinstance(source, Path):
            image = Image.open(io.BytesIO(source.read_bytes()))
        else:
            image = Image.open(io.BytesIO(source()))
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # decoders raise nearly anything on a broken file, SyntaxError included
        where = f"{source}: " if isinstance(source, Path) else ""
        raise CalibrationError(f"Cannot open the image: {where}{type(error).__name__}: {error}") from error
