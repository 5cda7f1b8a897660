"""How much of the work one Triton program takes, by card and by rows an expert.

Measured on compute capability 9.0 (H100) for more than 48 rows an expert; reasoned for fewer, and for other cards from their
registers and their shared memory a block: 163 KiB on 8.0, 99 KiB on 8.6, 8.9 and 12.x. A stage of ``block_linear`` holds a tile
of rows and, gated, two tiles of weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from typing import TypeVar

_MOST_SUMS = 64  # of a thread's 255 registers: more are spilled on 8.x
_MOST_SUMS_90 = 128  # its matrix units read operands from shared memory
_LEAST_STAGES = 3  # with fewer, loads wait for each other, in registers


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

    def shared_kib(self, parts: int) -> float:
        """Return the shared memory that stages take, for a product of so many parts."""
        return self.stages * (self.rows + parts * self.columns) * self.inner * 2 / 1024

    def sums(self, parts: int) -> float:
        """Return how many sums, and so registers, a thread holds."""
        return parts * self.rows * self.columns / (32 * self.warps)


_FEW = {16: Size(16, 64, 64, 4, 3), 48: Size(32, 64, 64, 4, 3)}
_LARGE = {**_FEW, 160: Size(64, 128, 64, 8, 4), 0: Size(128, 128, 64, 8, 3)}
_MIDDLE = {**_FEW, 160: Size(64, 128, 64, 8, 3), 0: Size(128, 64, 64, 8, 3)}
_SMALL = {**_FEW, 160: Size(64, 64, 64, 4, 3), 0: Size(128, 64, 64, 8, 3)}
_SHARED_KIB = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (12, 0): 99}
_TABLES = {(8, 0): _MIDDLE, (8, 6): _SMALL, (8, 7): _MIDDLE, (8, 9): _SMALL, (9, 0): _LARGE, (12, 0): _SMALL}


@dataclass(frozen=True)
class PairSize:
    """Of one program of ``pair_linear`` or ``pair_combine``.

    Attributes:
        columns: Of the result.
        inner: Most elements of the inner dimension at a time.
        warps: Of 32 threads.
    """

    columns: int
    inner: int
    warps: int

    def sums(self, parts: int) -> float:
        """Return how many sums, and so registers, a thread holds."""
        return parts * self.columns * self.inner / (32 * self.warps)


_Either = TypeVar("_Either", Size, PairSize)

_PAIRS, _PAIRS_TURNED = PairSize(8, 512, 4), PairSize(64, 64, 4)

PAIRS_AN_EXPERT = 1.0
"""Up to how many pairs an expert, on average, each pair is computed by itself, rather than sorted by expert.

Reasoned, not measured: up to there hardly two pairs share an expert's weights, and sorting costs launches. ``make gpu-check``
times both ways over a range of tokens and prints where they cross: that is the number to put here.
"""


def size_of(capability: tuple[int, int], rows_an_expert: float) -> Size:
    """Return the size for a card, the nearest one's where it is not in the table, and for a mean number of rows an expert."""
    table = _TABLES[_known(capability)]
    return next((size for most, size in table.items() if most and rows_an_expert <= most), table[0])


def sizes_to_try(capability: tuple[int, int], rows_an_expert: float, parts: int) -> list[Size]:
    """Return the size, first, and its neighbours: half or twice as much of one thing, or a stage more or less, if they fit.

    Args:
        capability: Of the card.
        rows_an_expert: Mean number; the rows of a program stay what the table says, since rows are cut into blocks once.
        parts: Of the product: 1, or 2 where it is gated.
    """
    size, card = size_of(capability, rows_an_expert), _known(capability)
    most_sums = _MOST_SUMS_90 if card == (9, 0) else _MOST_SUMS
    near = [*_near(size, "columns", 32, 256), *_near(size, "inner", 32, 128), *_near(size, "warps", 4, 8)]
    near += [replace(size, stages=stages) for stages in (size.stages - 1, size.stages + 1) if stages >= _LEAST_STAGES]
    return [size, *(item for item in near if item.shared_kib(parts) <= _SHARED_KIB[card] and item.sums(parts) <= most_sums)]


def pair_sizes_to_try(row_major: bool, parts: int) -> list[PairSize]:
    """Return the size of ``pair_size_of``, first, and its neighbours: half or twice as much of one thing."""
    size = pair_size_of(row_major)
    near = [*_near(size, "columns", 4, 128), *_near(size, "inner", 32, 1024), *_near(size, "warps", 2, 8)]
    return [size, *(item for item in near if item.sums(parts) <= _MOST_SUMS)]


def flattened(sizes: list[Size] | list[PairSize]) -> list[int]:
    """Return sizes as operations take them."""
    return [number for size in sizes for number in astuple(size)]


def _near(size: _Either, name: str, least: int, most: int) -> Iterator[_Either]:
    now = getattr(size, name)
    return (replace(size, **{name: number}) for number in (now // 2, now * 2) if least <= number <= most)


def _known(capability: tuple[int, int]) -> tuple[int, int]:
    return max((item for item in _TABLES if item <= capability), default=min(_TABLES))


def pair_size_of(row_major: bool) -> PairSize:
    """Return the size for weights that lie along their inner dimension in memory, or along their columns.

    What one warp reads lies side by side.
    """
    return _PAIRS if row_major else _PAIRS_TURNED


def takes_pairs(pairs: int, num_experts: int) -> bool:
    """Return whether so few pairs are computed one by one; see ``PAIRS_AN_EXPERT``."""
    return pairs <= num_experts * PAIRS_AN_EXPERT
