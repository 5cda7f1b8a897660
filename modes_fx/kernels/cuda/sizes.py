"""How much of the work one Triton program takes, by card and by rows an expert.

Measured on compute capability 9.0 (H100) for more than 48 rows an expert; reasoned for fewer, and for other cards from their
registers and their shared memory a block: 163 KiB on 8.0, 99 KiB on 8.6, 8.9 and 12.x. A stage of ``block_linear`` holds a tile
of rows and, gated, two tiles of weights.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Of one program of ``block_linear``.

    Attributes:
        rows: Of one expert.
        columns: Of the result.
        inner: Elements of the inner dimension at a time, of 2 bytes; half as many of 4.
        warps: Of 32 threads.
        stages: Of the software pipeline.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


_FEW = {16: Size(16, 64, 64, 4, 3), 48: Size(32, 64, 64, 4, 3)}
_LARGE = {**_FEW, 160: Size(64, 128, 64, 8, 4), 0: Size(128, 128, 64, 8, 3)}
_MIDDLE = {**_FEW, 160: Size(64, 128, 64, 8, 3), 0: Size(128, 64, 64, 8, 3)}
_SMALL = {**_FEW, 160: Size(64, 64, 64, 4, 3), 0: Size(128, 64, 64, 8, 3)}
_TABLES = {(8, 0): _MIDDLE, (8, 6): _SMALL, (8, 7): _MIDDLE, (8, 9): _SMALL, (9, 0): _LARGE, (12, 0): _SMALL}

PAIR_TILE = 8, 512
"""Columns, and most elements of the inner dimension at a time, of a program of ``pair_linear`` and ``pair_combine``."""
PAIR_TILE_TURNED = 64, 64
"""The same for weights that lie along their columns in memory: what one warp reads lies side by side."""


def size_of(capability: tuple[int, int], rows_an_expert: float) -> Size:
    """Return the size for a card, the nearest one's where it is not in the table, and for a mean number of rows an expert."""
    known = max((item for item in _TABLES if item <= capability), default=min(_TABLES))
    table = _TABLES[known]
    return next((size for most, size in table.items() if most and rows_an_expert <= most), table[0])


def takes_pairs(pairs: int, num_experts: int) -> bool:
    """Return whether so few pairs are computed one by one, since hardly two of them share an expert's weights."""
    return pairs <= num_experts
