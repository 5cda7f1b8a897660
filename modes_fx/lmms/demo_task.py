"""The embedded model's questions as a task of lmms-eval: drawn on the spot, so that there is no file to make or to fetch."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, DatasetDict, Features, Image, Value
from lmms_eval.api.task import ConfigurableMessagesTask

from modes_fx.demo import make_samples

_SPLIT = "test"


class DemoTask(ConfigurableMessagesTask):  # type: ignore[misc]
    """The questions of the test split, as many as ``modes-fx demo`` asks.

    Args:
        config: What ``tasks/modes_fx_demo.yaml`` says.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        """Draw the questions; ``dataset_kwargs`` holds ``n_images``."""
        samples = make_samples(_SPLIT, **(dataset_kwargs or {}))
        columns = {name: [getattr(sample, name) for sample in samples] for name in ("image", "question", "answer", "kind")}
        features = Features(image=Image(), question=Value("string"), answer=Value("string"), kind=Value("string"))
        questions = Dataset.from_dict(columns, features=features)
        self.dataset = DatasetDict({_SPLIT: questions})
        self.dataset_no_image = DatasetDict({_SPLIT: questions.remove_columns("image")})


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    """Return a question's images."""
    return [doc["image"]]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score an answer, for all questions and for its kind: 1 if it is right to the letter."""
    score = float(results[0] == doc["answer"])
    return {"exact_match": score, doc["kind"]: score}
