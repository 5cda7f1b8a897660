"""The harder job: two pictures, and questions whose text must be read as closely as they.

The first picture, on a black ground, has the rows A to C, the second, on a grey one, D to F. Questions name up to six cells of
both pictures, to be told in the order of the text, calculate, choose by a condition, or ask for all nine cells of one.
"""

from collections.abc import Callable, Sequence

import numpy as np
from demo_model.jobs.job import Asked, Job

from modes_fx.demo.canvas import CELLS, COLOURS, COLUMNS, DARK, SPLITS, Canvas, draw
from modes_fx.demo.questions import EMPTY, WORDS

PICTURES, GROUNDS = ("first", "second"), (DARK, (96, 144))
MORE_ROWS = ("D", "E", "F")
ALL_CELLS = (*CELLS, *(row + column for row in MORE_ROWS for column in COLUMNS))
Pair = tuple[str, str]
Rng = np.random.Generator


class Both:
    """What two canvases show, by cells 0 to 17."""

    def __init__(self, canvases: Sequence[Canvas]) -> None:
        self._digits = [digit for canvas in canvases for digit in canvas.digits]
        self._colours = [colour for canvas in canvases for colour in canvas.colours]
        self.filled = [[cell + 9 * place for cell in canvas.filled] for place, canvas in enumerate(canvases)]

    def digit(self, cell: int) -> str:
        """The digit in a cell, in words."""
        return EMPTY if self._digits[cell] is None else str(self._digits[cell])

    def colour(self, cell: int) -> str:
        """Its colour."""
        return self._colours[cell] or EMPTY

    def shown(self, cell: int) -> str:
        """Both."""
        return EMPTY if self._digits[cell] is None else f"{self._colours[cell]} {self._digits[cell]}"

    def some_filled(self, place: int, rng: Rng) -> int:
        """A cell of one picture that holds a digit."""
        return int(rng.choice(self.filled[place]))


def _in_order(how_many: int, what: str, tell: Callable[[Both, int], str]) -> Callable[[Both, Rng], Pair]:
    """Cells of either picture, in the order of the text; the answer names each before it tells of it."""

    def ask(both: Both, rng: Rng) -> Pair:
        cells = [int(cell) for cell in rng.permutation(len(ALL_CELLS))[:how_many]]
        answer = " ".join(f"{ALL_CELLS[cell]} {tell(both, cell)}" for cell in cells)
        return f"say {what} in {' , '.join(ALL_CELLS[cell] for cell in cells)} .", answer

    return ask


def _ask_larger(both: Both, rng: Rng) -> Pair | None:
    cells = [both.some_filled(place, rng) for place in range(2)]
    digits = [both.digit(cell) for cell in cells]
    if digits[0] == digits[1]:
        return None
    names = [ALL_CELLS[cell] for cell in cells]
    larger = names[int(digits[1]) > int(digits[0])]
    return f"which digits are in {names[0]} and {names[1]} , which is larger ?", f"{digits[0]} {digits[1]} {larger}"


def _ask_sum(both: Both, rng: Rng) -> Pair:
    cells = [both.some_filled(place, rng) for place in range(2)]
    digits = [both.digit(cell) for cell in cells]
    question = f"how many are {ALL_CELLS[cells[0]]} and {ALL_CELLS[cells[1]]} ?"
    return question, f"{digits[0]} {digits[1]} {sum(map(int, digits))}"


def _ask_condition(both: Both, rng: Rng) -> Pair:
    """Which of two cells of one picture to tell depends on the colour of a cell of the other."""
    place = int(rng.integers(2))
    cell = both.some_filled(place, rng)
    truth = both.colour(cell)
    holds = bool(rng.random() < 0.5)
    colour = truth if holds else str(rng.choice([each for each in COLOURS if each != truth]))
    yes, no = (int(each) + 9 * (1 - place) for each in rng.permutation(len(CELLS))[:2])
    chosen = yes if holds else no
    question = f"is {ALL_CELLS[cell]} {colour} ? yes : say {ALL_CELLS[yes]} , no : say {ALL_CELLS[no]} ."
    return question, f"{truth} {'yes' if holds else 'no'} {ALL_CELLS[chosen]} {both.digit(chosen)}"


def _ask_all_colours(both: Both, rng: Rng) -> Pair:
    place = int(rng.integers(2))
    cells = range(9 * place, 9 * place + 9)
    answer = " ".join(f"{ALL_CELLS[cell]} {both.colour(cell)}" for cell in cells)
    return f"which colours are in the {PICTURES[place]} ?", answer


_ASK: dict[str, Callable[[Both, Rng], Pair | None]] = {
    "digits": _in_order(3, "the digits", Both.digit),
    "colours": _in_order(6, "the colours", Both.colour),
    "shown": _in_order(2, "what is shown", Both.shown),
    "larger": _ask_larger,
    "sum": _ask_sum,
    "condition": _ask_condition,
    "all_colours": _ask_all_colours,
}


def _picture(split: str, rng: Rng, place: int) -> Canvas:
    return draw(split, rng, GROUNDS[place])


def _draw(split: str, index: int, seed: int, questions: int) -> list[Asked]:
    rng = np.random.default_rng([seed, SPLITS.index(split), index, len(PICTURES)])
    canvases = [_picture(split, rng, place) for place in range(len(PICTURES))]
    images, both = tuple(canvas.image for canvas in canvases), Both(canvases)
    asked: list[Asked] = []
    while len(asked) < questions:
        for kind in rng.permutation(list(_ASK)):
            pair = _ASK[kind](both, rng)
            if pair is not None and len(asked) < questions:
                asked.append(Asked(images, *pair, kind=str(kind)))
    return asked


_MORE_WORDS = (*PICTURES, *MORE_ROWS, *ALL_CELLS[9:], "say", ":", ".", *map(str, range(10, 19)))
JOB = Job("pairs", (*WORDS, *_MORE_WORDS), PICTURES, ALL_CELLS, tuple(_ASK), 24, _picture, _draw)
