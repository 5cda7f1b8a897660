"""A job: questions about pictures, in groups that share theirs."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from modes_fx.data import Sample
from modes_fx.demo.canvas import Canvas


@dataclass(frozen=True)
class Asked:
    """A question and what it is about.

    Attributes:
        images: RGB, 64x64, in order; the questions of one group share the objects.
        question: What the user asks.
        answer: Words separated by spaces.
        kind: Which of the kinds of question it is.
    """

    images: tuple[Image.Image, ...]
    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Job:
    """One kind of work.

    Attributes:
        name: What the scripts call it.
        words: Every word of every question and answer; the tokenizer has one token for each.
        image_names: What the chat template calls a sample's images, in order; a single one is not named.
        cells: What the cells of its pictures are called, picture by picture.
        kinds: Of questions.
        longest_answer: In tokens, with some to spare.
        picture: (split, rng, place) to what is shown as a sample's image of that place.
        draw: (split, index, seed, questions) to a group: that many questions about the images of one index.
    """

    name: str
    words: tuple[str, ...]
    image_names: tuple[str, ...]
    cells: tuple[str, ...]
    kinds: tuple[str, ...]
    longest_answer: int
    picture: Callable[[str, np.random.Generator, int], Canvas]
    draw: Callable[[str, int, int, int], list[Asked]]

    def groups(self, split: str, n_groups: int, seed: int, questions: int) -> list[list[Asked]]:
        """Draw groups of one split; equal arguments give equal groups, and no source image belongs to two splits."""
        return [self.draw(split, index, seed, questions) for index in range(n_groups)]


def as_data(asked: list[Asked]) -> list[Sample]:
    """Return questions as samples that are read from files."""
    return [Sample(f"{index}", each.question, each.answer, each.images) for index, each in enumerate(asked)]
