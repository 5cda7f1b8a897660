"""Questions about a canvas. Every kind is a function of a canvas; none can be answered from its text."""

from collections.abc import Callable

import numpy as np

from modes_fx.demo.canvas import CELLS, COLOURS, COLUMNS, ROWS, Canvas

EMPTY = "empty"
_WIDTH = len(COLUMNS)
_LINES = {f"row {name}": range(i * _WIDTH, (i + 1) * _WIDTH) for i, name in enumerate(ROWS)} | {
    f"column {name}": range(i, len(CELLS), _WIDTH) for i, name in enumerate(COLUMNS)
}

Pair = tuple[str, str]


def _digit(canvas: Canvas, cell: int) -> str:
    return EMPTY if canvas.digits[cell] is None else str(canvas.digits[cell])


def _colour(canvas: Canvas, cell: int) -> str:
    return canvas.colours[cell] or EMPTY


def _describe(canvas: Canvas, cell: int) -> str:
    return EMPTY if canvas.digits[cell] is None else f"{canvas.colours[cell]} {canvas.digits[cell]}"


def _list(canvas: Canvas, cells: range, tell: Callable[[Canvas, int], str]) -> str:
    """Name each cell before telling of it: the name is what the next token is looked up by."""
    return " ".join(f"{CELLS[cell]} {tell(canvas, cell)}" for cell in cells)


def _some_cell(canvas: Canvas, rng: np.random.Generator) -> int:
    """A filled cell nine times in ten, so that "empty" is no good guess."""
    return int(rng.choice(canvas.filled)) if rng.random() < 0.9 else int(rng.integers(len(CELLS)))


def _some_line(rng: np.random.Generator) -> tuple[str, range]:
    return list(_LINES.items())[rng.integers(len(_LINES))]


def _ask_digit(canvas: Canvas, rng: np.random.Generator) -> Pair:
    cell = _some_cell(canvas, rng)
    return f"which digit is in {CELLS[cell]} ?", _digit(canvas, cell)


def _ask_colour(canvas: Canvas, rng: np.random.Generator) -> Pair:
    cell = _some_cell(canvas, rng)
    return f"which colour is in {CELLS[cell]} ?", _colour(canvas, cell)


def _ask_cell(canvas: Canvas, rng: np.random.Generator) -> Pair:
    cell = _some_cell(canvas, rng)
    return f"what is shown in {CELLS[cell]} ?", _describe(canvas, cell)


def _ask_neighbour(canvas: Canvas, rng: np.random.Generator) -> Pair:
    words = {"right of": (0, 1), "left of": (0, -1), "above": (-1, 0), "below": (1, 0)}
    word = list(words)[rng.integers(len(words))]
    down, right = words[word]
    inside = [
        (cell, cell + _WIDTH * down + right)
        for cell in range(len(CELLS))
        if 0 <= cell // _WIDTH + down < len(ROWS) and 0 <= cell % _WIDTH + right < _WIDTH
    ]
    pairs = [pair for pair in inside if canvas.digits[pair[1]] is not None] or inside
    cell, neighbour = pairs[rng.integers(len(pairs))]
    return f"what is shown {word} {CELLS[cell]} ?", f"{CELLS[neighbour]} {_describe(canvas, neighbour)}"


def _ask_line_digits(canvas: Canvas, rng: np.random.Generator) -> Pair:
    name, cells = _some_line(rng)
    return f"which digits are in {name} ?", _list(canvas, cells, _digit)


def _ask_line_colours(canvas: Canvas, rng: np.random.Generator) -> Pair:
    name, cells = _some_line(rng)
    return f"which colours are in {name} ?", _list(canvas, cells, _colour)


def _ask_line(canvas: Canvas, rng: np.random.Generator) -> Pair:
    name, cells = _some_line(rng)
    return f"what is shown in {name} ?", _list(canvas, cells, _describe)


def _ask_count(canvas: Canvas, rng: np.random.Generator) -> Pair:
    return "how many digits are shown ?", str(len(canvas.filled))


def _ask_is_digit(canvas: Canvas, rng: np.random.Generator) -> Pair:
    cell = int(rng.choice(canvas.filled))
    truth = int(_digit(canvas, cell))
    yes = rng.random() < 0.5
    asked = truth if yes else (truth + int(rng.integers(1, 10))) % 10
    return f"which digit is in {CELLS[cell]} , is it a {asked} ?", f"{truth} {'yes' if yes else 'no'}"


def _ask_same_colour(canvas: Canvas, rng: np.random.Generator) -> Pair | None:
    yes = rng.random() < 0.5
    pairs = [
        (one, other)
        for one in canvas.filled
        for other in canvas.filled
        if one != other and (canvas.colours[one] == canvas.colours[other]) == yes
    ]
    if not pairs:
        return None
    one, other = pairs[rng.integers(len(pairs))]
    question = f"which colours are in {CELLS[one]} and {CELLS[other]} , are they the same ?"
    return question, f"{canvas.colours[one]} {canvas.colours[other]} {'yes' if yes else 'no'}"


def _ask_larger(canvas: Canvas, rng: np.random.Generator) -> Pair | None:
    pairs = [(one, other) for one in canvas.filled for other in canvas.filled if canvas.digits[one] != canvas.digits[other]]
    if not pairs:
        return None
    one, other = pairs[rng.integers(len(pairs))]
    question = f"which digits are in {CELLS[one]} and {CELLS[other]} , which is larger ?"
    digits = _digit(canvas, one), _digit(canvas, other)
    return question, f"{digits[0]} {digits[1]} {max(digits)}"


_ASK: dict[str, Callable[[Canvas, np.random.Generator], Pair | None]] = {
    "digit": _ask_digit,
    "colour": _ask_colour,
    "cell": _ask_cell,
    "neighbour": _ask_neighbour,
    "line_digits": _ask_line_digits,
    "line_colours": _ask_line_colours,
    "line": _ask_line,
    "count": _ask_count,
    "is_digit": _ask_is_digit,
    "same_colour": _ask_same_colour,
    "larger": _ask_larger,
}
KINDS = tuple(_ASK)

# Every word of every question and answer; the tokenizer has one token for each.
# fmt: off
WORDS = (
    "which", "what", "how", "many", "is", "are", "it", "they", "digit", "digits", "colour", "colours", "in", "of", "a",
    "and", "the", "same", "larger", "shown", "right", "left", "above", "below", "row", "column", "yes", "no", "?",
    ",",
    EMPTY,
    *map(str, range(10)),
    *COLOURS,
    *ROWS,
    *CELLS,
)
# fmt: on


def ask(canvas: Canvas, kind: str, rng: np.random.Generator) -> Pair | None:
    """Ask one question.

    Args:
        canvas: what to ask about.
        kind: one of `KINDS`.
        rng: picks the cells; the balance of yes and no is its doing too.

    Returns:
        Question and answer, words separated by spaces; None where the canvas does not allow this kind.
    """
    return _ASK[kind](canvas, rng)
