"""What a rule does in decode steps: fewer experts read for the same answers.

A step of a batch reads an expert's weights once, however many of its tokens want it, and reading is what takes the time. So
rules are compared here at equal numbers of distinct experts read, whatever pairs they skip. Prompts are prefilled with all
experts, cut where the first answer of the batch begins; what follows is decoded, a token of every sequence a step, given the
reference answer (teacher forcing).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from modes_fx.calib.objective import Answers, Evaluation, at_answers
from modes_fx.data.batch import Batch, before_answers, beginning_of_answers
from modes_fx.errors import CalibrationError
from modes_fx.measure.compare.samples import SampleObjective, SampleScores
from modes_fx.modality import vision_token_ids
from modes_fx.optimize import optimized_state
from modes_fx.plan.budget import Budget

_DECODE = 1


class DecodedAnswers(Answers):
    """A model's logits at the answer tokens, decoded one by one by its own ``generate``."""

    def ready(self, batches: Iterable[Batch]) -> list[Batch]:
        """Return the batches.

        Raises:
            CalibrationError: One is padded on the right or has pictures behind the beginning of an answer, or none has any
                token to decode.
        """
        found = list(batches)
        for index, batch in enumerate(found):
            mask, first = batch.get("attention_mask"), beginning_of_answers(batch["labels"])
            if isinstance(mask, Tensor) and not bool(mask[:, -1].all()):
                raise CalibrationError(f"Batch {index} is padded on the right; decoding needs padding on the left.")
            decoded = batch["input_ids"][:, first:]
            if bool(torch.isin(decoded, torch.tensor(vision_token_ids(self._model.config), dtype=decoded.dtype)).any()):
                raise CalibrationError(
                    f"Batch {index} has pictures behind the beginning of its longest answer, and nothing decodes pictures. "
                    "Make batches with by_answer=True, as `modes-fx compare` does, or smaller ones (--batch-size)."
                )
        if found and all(batch["labels"].shape[1] - beginning_of_answers(batch["labels"]) < 2 for batch in found):
            raise CalibrationError("There are answers of one token alone: no decode step computes any.")
        return found

    def __call__(self, batch: Batch, *, grad: bool = False) -> tuple[Tensor, Tensor]:
        """Return logits [answer tokens, V], and bool [B]: whether greedy decoding gives the answer."""
        first, generator = beginning_of_answers(batch["labels"]), self._model
        given: Any = before_answers(batch, self._device)
        answers = batch["input_ids"][:, first:].to(self._device)
        steps = answers.shape[1]
        with torch.set_grad_enabled(grad):
            said = generator.generate(  # type: ignore[operator]
                **given, min_new_tokens=steps, max_new_tokens=steps, do_sample=False, use_cache=True, eos_token_id=None,
                logits_processor=LogitsProcessorList([_Forced(answers, first)]), output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        return at_answers(torch.stack(said.logits, dim=1), batch["labels"].cpu()[:, first:])


class DecodeObjective(SampleObjective):
    """An objective whose skip ratio is the share of the experts that the unskipped model's decode steps read and this does not.

    Args:
        model: An optimised model that generates.
        batches: See ``Objective``; padded on the left.

    Attributes:
        experts_read: By the unskipped model: distinct experts, summed over layers, steps and batches.

    Raises:
        CalibrationError: See ``Objective`` and ``DecodedAnswers.ready``.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Batch]) -> None:
        with optimized_state(model).runtime.stats.experts_read() as read:
            super().__init__(model, batches, DecodedAnswers(model))
        self.experts_read = _in_decode(read)

    def evaluate(self, bounds: Tensor | Budget) -> Evaluation:
        """Decode all batches under bounds, float32 [L, 2]; prefills keep all."""
        assert isinstance(bounds, Tensor), "a budget is about prefills"
        scores = self.scores(bounds)
        kl, accuracy = float(scores.kl_S.sum() / scores.tokens_S.sum()), float(scores.correct_S.double().mean())
        return Evaluation(kl, scores.skip_ratio["all"], float("nan"), float("nan"), accuracy)

    def scores(self, bounds: Tensor | None) -> SampleScores:
        """Decode all batches under bounds; None keeps all.

        The skip ratios are ``all``, that of experts, and ``decode``, that of pairs in decode steps.
        """
        with self._runtime.stats.experts_read() as self._read:
            return super().scores(None if bounds is None else self._decoding(bounds))

    def _decoding(self, bounds: Tensor) -> Tensor:
        return torch.stack([torch.full_like(bounds, self._runtime.rule.keep_all), bounds])

    def _ratios(self, routed: Tensor, kept: Tensor) -> dict[str, float]:
        pairs = 1 - int(kept[..., _DECODE].sum()) / int(routed[..., _DECODE].sum())
        return {"all": 1 - _in_decode(self._read) / self.experts_read, "decode": pairs}


class _Forced(LogitsProcessor):
    """Has ``generate`` say the tokens that it is given, int64 [B, steps], behind so many."""

    def __init__(self, tokens: Tensor, behind: int) -> None:
        self._tokens, self._behind = tokens, behind

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        said = self._tokens[:, input_ids.shape[1] - self._behind]
        return torch.full_like(scores, -torch.inf).scatter(1, said.unsqueeze(1), 0.0)


def _in_decode(read: list[tuple[int, Any, int]]) -> int:
    return sum(experts for _, phase, experts in read if phase == "decode")
