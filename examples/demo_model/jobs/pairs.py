"""The harder job: two pictures, on a black ground and on a grey one, and questions whose text must be read as closely as they.

Codes are drawn anew for each question, so that an answer in code is looked up in the text; other questions name cells of both
pictures, calculate, choose by a condition, or ask for all nine cells of one.
"""

from collections.abc import Callable, Sequence

import numpy as np
from demo_model.jobs.job import Asked, Job

from modes_fx.demo.canvas import CELLS, COLOURS, DARK, SPLITS, Canvas, draw
from modes_fx.demo.questions import EMPTY, LINES, WORDS

PICTURES, GROUNDS = ("black", "grey"), (DARK, (96, 144))
CODE = ("ba", "be", "bi", "bo", "bu", "da", "de", "di", "do", "du")
Pair = tuple[str, str]
Rng = np.random.Generator


def _digit(canvas: Canvas, cell: int) -> str:
    return EMPTY if canvas.digits[cell] is None else str(canvas.digits[cell])


def _colour(canvas: Canvas, cell: int) -> str:
    return canvas.colours[cell] or EMPTY


def _some_picture(rng: Rng) -> int:
    return int(rng.integers(len(PICTURES)))


def _some_filled(canvas: Canvas, rng: Rng) -> int:
    return int(rng.choice(canvas.filled))


def _code_book(names: Sequence[str], rng: Rng) -> tuple[str, dict[str, str]]:
    """A code in words, in random order, and as a table; what is empty stays so."""
    words = dict(zip(names, map(str, rng.permutation(CODE)), strict=False))
    text = " , ".join(f"{names[index]} is {words[names[index]]}" for index in rng.permutation(len(names)))
    return f"code : {text} .", {**words, EMPTY: EMPTY}


def _in_code(names: Sequence[str], tell: Callable[[Canvas, int], str], what: str) -> Callable[[Sequence[Canvas], Rng], Pair]:
    def ask(canvases: Sequence[Canvas], rng: Rng) -> Pair:
        text, code = _code_book(names, rng)
        picture, (line, cells) = _some_picture(rng), list(LINES.items())[rng.integers(len(LINES))]
        answer = " ".join(f"{CELLS[cell]} {code[tell(canvases[picture], cell)]}" for cell in cells)
        return f"{text} say the {what} in {line} of the {PICTURES[picture]} in code .", answer

    return ask


def _ask_larger(canvases: Sequence[Canvas], rng: Rng) -> Pair | None:
    one, other = (_some_filled(canvas, rng) for canvas in canvases)
    digits = canvases[0].digits[one], canvases[1].digits[other]
    if digits[0] is None or digits[1] is None or digits[0] == digits[1]:
        return None
    question = f"which digits are in {CELLS[one]} of the black and {CELLS[other]} of the grey , which is larger ?"
    return question, f"{digits[0]} {digits[1]} {PICTURES[digits[1] > digits[0]]}"


def _ask_sum(canvases: Sequence[Canvas], rng: Rng) -> Pair:
    one, other = (_some_filled(canvas, rng) for canvas in canvases)
    digits = canvases[0].digits[one] or 0, canvases[1].digits[other] or 0
    question = f"how many are {CELLS[one]} of the black and {CELLS[other]} of the grey ?"
    return question, f"{digits[0]} {digits[1]} {sum(digits)}"


def _ask_read(canvases: Sequence[Canvas], rng: Rng) -> Pair:
    """Three cells of either picture, in the order of the text."""
    places = [(_some_picture(rng), int(rng.integers(len(CELLS)))) for _ in range(3)]
    question = " , ".join(f"{CELLS[cell]} of the {PICTURES[picture]}" for picture, cell in places)
    answer = " ".join(f"{CELLS[cell]} {_digit(canvases[picture], cell)}" for picture, cell in places)
    return f"say {question} .", answer


def _ask_condition(canvases: Sequence[Canvas], rng: Rng) -> Pair:
    """Which of two cells to name depends on the colour of a third."""
    picture = _some_picture(rng)
    asked, other = canvases[picture], canvases[1 - picture]
    cell = _some_filled(asked, rng)
    truth = _colour(asked, cell)
    colour = truth if rng.random() < 0.5 else str(rng.choice([each for each in COLOURS if each != truth]))
    yes, no = (int(each) for each in rng.permutation(len(CELLS))[:2])
    question = (
        f"is {CELLS[cell]} of the {PICTURES[picture]} {colour} ? yes : say {CELLS[yes]} , no : say {CELLS[no]} "
        f"of the {PICTURES[1 - picture]} ."
    )
    holds = colour == truth
    chosen = yes if holds else no
    return question, f"{truth} {'yes' if holds else 'no'} {CELLS[chosen]} {_digit(other, chosen)}"


def _ask_all_colours(canvases: Sequence[Canvas], rng: Rng) -> Pair:
    picture = _some_picture(rng)
    answer = " ".join(f"{name} {_colour(canvases[picture], cell)}" for cell, name in enumerate(CELLS))
    return f"which colours are in the {PICTURES[picture]} ?", answer


_ASK: dict[str, Callable[[Sequence[Canvas], Rng], Pair | None]] = {
    "digits_in_code": _in_code([str(digit) for digit in range(10)], _digit, "digits"),
    "colours_in_code": _in_code(list(COLOURS), _colour, "colours"),
    "larger": _ask_larger,
    "sum": _ask_sum,
    "read": _ask_read,
    "condition": _ask_condition,
    "all_colours": _ask_all_colours,
}


def _picture(split: str, rng: Rng, place: int) -> Canvas:
    return draw(split, rng, GROUNDS[place])


def _draw(split: str, index: int, seed: int, questions: int) -> list[Asked]:
    rng = np.random.default_rng([seed, SPLITS.index(split), index, len(PICTURES)])
    canvases = [_picture(split, rng, place) for place in range(len(PICTURES))]
    images = tuple(canvas.image for canvas in canvases)
    asked: list[Asked] = []
    while len(asked) < questions:
        for kind in rng.permutation(list(_ASK)):
            pair = _ASK[kind](canvases, rng)
            if pair is not None and len(asked) < questions:
                asked.append(Asked(images, *pair, kind=str(kind)))
    return asked


_MORE_WORDS = (*PICTURES, "code", "say", ":", ".", *map(str, range(10, 19)), *CODE)
JOB = Job("pairs", (*WORDS, *_MORE_WORDS), PICTURES, tuple(_ASK), 24, _picture, _draw)
