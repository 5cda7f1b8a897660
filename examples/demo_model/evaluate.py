"""Exact-match accuracy of the demo model, by kind of question."""

from collections import defaultdict

import torch
from demo_model.jobs.job import Asked, as_data
from torch import Tensor, nn
from transformers import ProcessorMixin

from modes_fx.data import make_batches
from modes_fx.demo.data import IGNORED


@torch.inference_mode()
def exact_match(model: nn.Module, processor: ProcessorMixin, asked: list[Asked], batch_size: int = 88) -> Tensor:
    """Whether the most likely token is right at every token of the answer.

    With the right answer as context this equals greedy decoding: the first mistake ends either.

    Returns:
        bool [N].
    """
    correct = []
    for batch in make_batches(as_data(asked), processor, batch_size):
        batch = dict(batch)
        labels_BS = batch.pop("labels")[:, 1:]
        predicted_BS = model(**batch, use_cache=False).logits[:, :-1].argmax(-1)
        correct.append(((predicted_BS == labels_BS) | (labels_BS == IGNORED)).all(1))
    return torch.cat(correct)


def accuracy_by_kind(model: nn.Module, processor: ProcessorMixin, asked: list[Asked]) -> dict[str, dict[str, float | int]]:
    """Accuracy and count of each kind of question, and of all of them under "all"."""
    correct = exact_match(model, processor, asked).tolist()
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for each, is_correct in zip(asked, correct, strict=True):
        by_kind[each.kind].append(is_correct)
    by_kind = {"all": correct, **dict(sorted(by_kind.items()))}
    return {kind: {"accuracy": round(sum(hits) / len(hits), 4), "n": len(hits)} for kind, hits in by_kind.items()}
