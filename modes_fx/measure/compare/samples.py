"""What a rule does to each sample of the test data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modes_fx.calib.objective import Objective, bounds_in_force, divergence_of_rows
from modes_fx.data.batch import IGNORED


@dataclass(frozen=True)
class SampleScores:
    """Measured on S samples, in the order of the batches.

    Attributes:
        kl_S: float64, sum over its answer tokens of KL(unskipped || skipped), in nats.
        tokens_S: int64, its answer tokens.
        flips_S: int64, those whose most likely token is another one.
        correct_S: bool, whether greedy decoding gives the answer.
        skip_ratio: Dropped / routed pairs, by name: ``all``, ``text``, ``vision``; in prefill, for the answers are given.
            Other objectives have other names.
    """

    kl_S: Tensor
    tokens_S: Tensor
    flips_S: Tensor
    correct_S: Tensor
    skip_ratio: dict[str, float]


class SampleObjective(Objective):
    """An ``Objective`` that tells its samples apart; for one process."""

    def scores(self, bounds: Tensor | None) -> SampleScores:
        """Run all batches under bounds; None keeps all pairs."""
        stats = self._runtime.stats
        routed, kept = stats.pairs_routed, stats.pairs_kept
        parts: list[tuple[Tensor, ...]] = []
        with bounds_in_force(self._runtime, bounds), stats.counting():
            for batch, reference in zip(self._batches, self._reference, strict=True):
                logits, correct = self._answers(batch)
                counts = (batch["labels"][:, 1:] != IGNORED).sum(dim=1).cpu()
                unskipped = reference.to(logits.device)
                kl = divergence_of_rows(unskipped, logits).double().cpu()
                flips = (unskipped.argmax(dim=-1) != logits.argmax(dim=-1)).long().cpu()
                sums = [_by_sample(values, counts) for values in (kl, flips)]
                parts.append((sums[0].clamp(min=0), counts, sums[1], correct.cpu()))
        ratios = self._ratios(stats.pairs_routed - routed, stats.pairs_kept - kept)
        kl_S, tokens_S, flips_S, correct_S = (torch.cat(column) for column in zip(*parts, strict=True))
        return SampleScores(kl_S, tokens_S, flips_S, correct_S, ratios)

    def _ratios(self, routed: Tensor, kept: Tensor) -> dict[str, float]:
        """Return skip ratios by name from pairs counted, int64 [layers, modalities, phases]."""
        routed_m, kept_m = routed.sum(dim=(0, 2)), kept.sum(dim=(0, 2))
        pairs = {"all": slice(None), "text": slice(0, 1), "vision": slice(1, 2)}
        return {
            name: 1 - int(kept_m[part].sum()) / int(routed_m[part].sum())
            for name, part in pairs.items()
            if routed_m[part].sum()
        }


def _by_sample(values: Tensor, counts: Tensor) -> Tensor:
    """Sum what belongs to answer tokens, in order, by sample."""
    sample = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return torch.zeros(len(counts), dtype=values.dtype).index_add_(0, sample, values)
