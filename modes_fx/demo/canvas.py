"""Canvases: a 3x3 grid of handwritten digits in four colours, drawn from the embedded source images."""

import functools
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from modes_fx.files.shipped import read_shipped

SPLITS = ("train", "calibration", "validation", "test")
COLOURS = {"red": (235, 60, 60), "green": (60, 205, 85), "blue": (85, 120, 255), "yellow": (235, 210, 60)}
ROWS, COLUMNS = "ABC", "123"
CELLS = tuple(row + column for row in ROWS for column in COLUMNS)
SIDE = 64
DARK = (0, 48)  # least and most of a ground's noise, of 255

# A cell's window is one pixel wider than the grid's pitch, so that three of them end exactly at the border.
_PITCH, _WINDOW, _SOURCE = 21, 22, 16
_FEWEST_DIGITS = 3


@dataclass(frozen=True)
class Canvas:
    """An image and what is drawn in its nine cells, in the order of `CELLS`; None where a cell is empty."""

    image: Image.Image
    digits: tuple[int | None, ...]
    colours: tuple[str | None, ...]

    @property
    def filled(self) -> list[int]:
        """Indices of the cells that hold a digit."""
        return [cell for cell, digit in enumerate(self.digits) if digit is not None]


@functools.cache
def source_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one split of the source images; the splits share no image.

    Args:
        split: one of `SPLITS`.

    Returns:
        uint8 [N, 16, 16] grey digits and uint8 [N] labels.

    Raises:
        ValueError: if there is no such split.
        ModelError: if the file of the images is missing or damaged.
    """
    if split not in SPLITS:
        raise ValueError(f"No split {split!r} in the demo's digits; pass one of {', '.join(SPLITS)}.")
    with np.load(io.BytesIO(read_shipped("digits.npz"))) as arrays:
        return arrays[f"{split}_images"], arrays[f"{split}_labels"]


def draw(split: str, rng: np.random.Generator, ground: tuple[int, int] = DARK) -> Canvas:
    """Draw one canvas: each cell is filled with a probability that itself varies between canvases.

    Args:
        split: whose source images to draw.
        rng: decides everything; equal states give equal canvases.
        ground: least and most of the noise behind the digits, of 255.
    """
    images, labels = source_digits(split)
    fill = rng.uniform(0.35, 0.9)
    order = rng.permutation(len(CELLS))
    filled = rng.random(len(CELLS)) < fill
    filled[order[:_FEWEST_DIGITS]] = True  # so that every question has something to ask about
    pixels = rng.integers(*ground, (SIDE, SIDE, 3)).astype(np.float32)
    names = list(COLOURS)
    digits: list[int | None] = []
    colours: list[str | None] = []
    for cell in range(len(CELLS)):
        if not filled[cell]:
            digits.append(None)
            colours.append(None)
            continue
        index, name = int(rng.integers(len(labels))), names[rng.integers(len(names))]
        top, left = (_PITCH * place for place in divmod(cell, len(COLUMNS)))
        window = pixels[top : top + _WINDOW, left : left + _WINDOW]
        opacity = _warp(images[index], rng)[..., None]
        tint = np.array(COLOURS[name], dtype=np.float32) * rng.uniform(0.75, 1.0)
        window += opacity * (tint - window)
        digits.append(int(labels[index]))
        colours.append(name)
    return Canvas(Image.fromarray(pixels.astype(np.uint8)), tuple(digits), tuple(colours))


def _warp(digit: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scale to 14-18 pixels, rotate, shear and shift a grey uint8 [16, 16] digit: float32 [22, 22] in 0..1."""
    scale = _SOURCE / rng.uniform(14, 18)
    angle, shear = rng.uniform(-0.2, 0.2), rng.uniform(-0.15, 0.15)
    shift_x, shift_y = rng.uniform(-1.5, 1.5, 2)
    # PIL wants the map from output to input pixels; both are centred so that warps turn about the middle.
    a, b = scale * np.cos(angle), scale * (np.sin(angle) + shear)
    d, e = -scale * np.sin(angle), scale * np.cos(angle)
    x, y = _WINDOW / 2 + shift_x, _WINDOW / 2 + shift_y
    c, f = _SOURCE / 2 - a * x - b * y, _SOURCE / 2 - d * x - e * y
    warped = Image.fromarray(digit).transform(
        (_WINDOW, _WINDOW), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR
    )
    return np.asarray(warped, dtype=np.float32) / 255
