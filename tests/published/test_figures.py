"""The figures were copied right: they give the means that the paper prints beside them."""

import pytest
from published.figures import BENCHMARKS, MODELS, Published, retained

every_model = pytest.mark.parametrize("published", MODELS.values(), ids=MODELS)


@every_model
def test_each_row_gives_the_papers_own_mean(published: Published) -> None:
    means = {target: retained(scores, published.default) for target, scores in published.skipped.items()}
    assert means == pytest.approx(published.retained, abs=0.011)  # of numbers rounded to .01
    assert retained(published.default, published.default) == 100


@every_model
def test_every_figure_is_there(published: Published) -> None:
    assert len(BENCHMARKS) == 13
    assert len(published.skipped) == 3
    for scores in (published.default, *published.skipped.values()):
        assert list(scores) == [benchmark.name for benchmark in BENCHMARKS]
