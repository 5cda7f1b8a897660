"""The embedded model's job: one picture, a 3x3 grid of handwritten digits in four colours."""

from demo_model.jobs.job import Asked, Job

from modes_fx.demo.canvas import CELLS, draw
from modes_fx.demo.data import draw_samples
from modes_fx.demo.questions import KINDS, WORDS


def _draw(split: str, index: int, seed: int, questions: int) -> list[Asked]:
    return [Asked((each.image,), each.question, each.answer, each.kind) for each in draw_samples(split, index, seed, questions)]


JOB = Job("grid", WORDS, ("picture",), CELLS, KINDS, 16, lambda split, rng, _: draw(split, rng), _draw)
