"""Exact-match accuracy of the demo model, by kind of question."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin

from modes_fx.demo.data import IGNORED, Sample, collate


@torch.inference_mode()
def exact_match(model: nn.Module, processor: ProcessorMixin, samples: Sequence[Sample], batch_size: int = 88) -> Tensor:
    """Whether the most likely token is right at every token of the answer.

    With the right answer as context this equals greedy decoding: the first mistake ends either.

    Returns:
        bool [N].
    """
    correct = []
    for start in range(0, len(samples), batch_size):
        batch = collate(samples[start : start + batch_size], processor)
        labels_BS = batch.pop("labels")[:, 1:]
        predicted_BS = model(**batch, use_cache=False).logits[:, :-1].argmax(-1)
        correct.append(((predicted_BS == labels_BS) | (labels_BS == IGNORED)).all(1))
    return torch.cat(correct)


def accuracy_by_kind(
    model: nn.Module, processor: ProcessorMixin, samples: Sequence[Sample]
) -> dict[str, dict[str, float | int]]:
    """Accuracy and count of each kind of question, and of all of them under "all"."""
    correct = exact_match(model, processor, samples).tolist()
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for sample, is_correct in zip(samples, correct, strict=True):
        by_kind[sample.kind].append(is_correct)
    by_kind = {"all": correct, **dict(sorted(by_kind.items()))}
    return {kind: {"accuracy": round(sum(hits) / len(hits), 4), "n": len(hits)} for kind, hits in by_kind.items()}
