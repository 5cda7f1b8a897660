"""Data with answers for a tiny vision-language model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import oracle, tiny

Batch = dict[str, Tensor]


def with_answers(seed: int, *, side: str = "left") -> Batch:
    """A mixed batch; the answers are the last real tokens of each row: one, two and three of them."""
    batch = tiny.mixed_batch(seed=seed, side=side)
    labels = torch.full_like(batch["input_ids"], -100)
    for row, mask in enumerate(batch["attention_mask"]):
        last = int(mask.nonzero()[-1])
        labels[row, last - row : last + 1] = batch["input_ids"][row, last - row : last + 1]
    return {**batch, "labels": labels}


def without_labels(batch: Batch) -> Batch:
    return {key: value for key, value in batch.items() if key != "labels"}


class Malicious:
    """Pickled, it is a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def oracle_kl(batches: list[Batch], bounds: Tensor) -> tuple[float, Tensor, Tensor]:
    """KL(unskipped || skipped) over answer tokens in nats, and pairs routed and kept; in float64, token by token."""
    total, tokens = 0.0, 0
    stock, skipped = oracle.Oracle(tiny.make(), None), oracle.Oracle(tiny.make(), bounds)
    for batch in batches:
        inputs, classes = without_labels(batch), tiny.classes(batch)
        p = torch.softmax(stock(classes, **inputs, use_cache=False).logits, -1)
        q = torch.softmax(skipped(classes, **inputs, use_cache=False).logits, -1)
        for row, position in (batch["labels"] != -100).nonzero().tolist():
            before = position - 1  # the position that predicts this token
            total += float((p[row, before] * (p[row, before] / q[row, before]).log()).sum())
            tokens += 1
    return total / tokens, skipped.routed, skipped.kept


@pytest.fixture
def batches() -> list[Batch]:
    return [with_answers(1), with_answers(2, side="right")]


@pytest.fixture(scope="module")
def model(optimized_once: nn.Module) -> nn.Module:
    return optimized_once
