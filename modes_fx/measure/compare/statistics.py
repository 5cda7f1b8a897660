"""What the rivals take from calibration data: how steep each layer's routing is, and how alike its experts are."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modes_fx.calib.objective import Answers, bounds_in_force
from modes_fx.calib.routing import BINS, bin_centres, bin_of, dispatches_shown
from modes_fx.data.batch import Batch
from modes_fx.errors import CalibrationError
from modes_fx.modality import PADDING
from modes_fx.optimize import optimized_state
from modes_fx.policies.ranks import at_or_after, tail_sums

logger = logging.getLogger(__name__)

TOKENS = 256  # a layer, on which experts are compared


@dataclass(frozen=True)
class RoutingStatistics:
    """Of each MoE layer of the unskipped model.

    Attributes:
        tail_share: Median, over tokens and ranks 2 to K, of the share of a token's weight from that rank on (NAEE's beta in the
            top-k form); 1 where K = 1.
        ratio_to_first: Median, over the same, of weight / the token's largest weight (NAEE's beta as published).
        similarity: E rows of E numbers a layer, the similarity of two experts over the layer's mean, 1 on the diagonal (DiEP);
            () if it was not asked for.
    """

    tail_share: tuple[float, ...]
    ratio_to_first: tuple[float, ...]
    similarity: tuple[tuple[tuple[float, ...], ...], ...]


def routing_statistics(
    model: nn.Module, batches: Sequence[Batch], *, similarity: bool = True, tokens: int = TOKENS
) -> RoutingStatistics:
    """Run the unskipped model once, uncompiled, and for ``similarity`` all experts of each layer on some of its tokens.

    Args:
        model: An optimised model.
        batches: Calibration data; see ``Objective``.
        similarity: Whether to compare experts. That costs ``tokens * E`` rows of experts a layer.
        tokens: Tokens on which experts are compared, evenly from all batches; padding is none.
    """
    state = optimized_state(model)
    layers = len(state.layers)
    shares, ratios = (torch.zeros(layers, BINS, dtype=torch.int64) for _ in range(2))
    hidden: list[list[Tensor]] = [[] for _ in range(layers)]
    wanted = -(-tokens // len(batches)) if similarity else 0

    def see(layer: int, hidden_TH: Tensor, weights_TK: Tensor, classes_T: Tensor) -> None:
        real = classes_T != PADDING
        weights = weights_TK.detach()[real].float().clamp(min=0)
        behind = ~at_or_after(weights).all(dim=2)  # all but rank 1
        tails, first = tail_sums(weights), weights.amax(dim=1, keepdim=True)
        for counts, values, whole in ((shares, tails, tails.amax(dim=1, keepdim=True)), (ratios, weights, first)):
            found = torch.where(whole > 0, values / whole, 0.0)[behind]
            counts[layer] += torch.bincount(bin_of(found), minlength=BINS).cpu()
        if wanted:
            rows = hidden_TH.detach()[real]
            even = torch.linspace(0, len(rows) - 1, min(wanted, len(rows))).round().long()
            hidden[layer].append(rows[even.to(rows.device)].cpu())

    logger.info("statistics of the routing of %d layers, on %d batches", layers, len(batches))
    answers, alike = Answers(model), []
    with bounds_in_force(state.runtime, None), dispatches_shown(model, see):
        for batch in batches:
            answers(batch)
    if wanted:
        state.runtime.suspended = True
        try:
            for index, (layer, rows) in enumerate(zip(state.layers, hidden, strict=True)):
                site = state.runtime.sites.get(index)  # a layer that was not rewritten, or never ran, has no table to look up
                experts = site.num_experts if site else 1
                seen = bool(site and rows)
                alike.append(
                    _similarity(layer.experts, torch.cat(rows)[:tokens], experts) if seen else torch.ones(experts, experts)
                )
        finally:
            state.runtime.suspended = False
    return RoutingStatistics(
        _medians(shares), _medians(ratios), tuple(tuple(tuple(row) for row in table.tolist()) for table in alike)
    )


def linear_cka(outputs_ENH: Tensor) -> Tensor:
    """Return the linear CKA of each two experts, float64 [E, E]: how alike their outputs on N tokens are, up to rotation."""
    centred = outputs_ENH.double() - outputs_ENH.double().mean(dim=1, keepdim=True)
    grams = (centred @ centred.transpose(1, 2)).flatten(1)
    norms = grams.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    alike: Tensor = (grams @ grams.T) / (norms.unsqueeze(1) * norms.unsqueeze(0))
    return alike


@torch.no_grad()
def _similarity(experts: nn.Module, rows_NH: Tensor, num_experts: int) -> Tensor:
    weight = next(experts.parameters())
    device = torch.device("cpu") if weight.device.type == "meta" else weight.device
    rows = rows_NH.to(device)
    ones = torch.ones(len(rows), 1, dtype=rows.dtype, device=device)
    everywhere = (torch.full((len(rows), 1), expert, dtype=torch.int64, device=device) for expert in range(num_experts))
    alike = linear_cka(torch.stack([experts(rows, ids, ones).float().cpu() for ids in everywhere]))
    others = ~torch.eye(num_experts, dtype=torch.bool)
    mean = alike[others].mean() if num_experts > 1 else torch.tensor(1.0)
    if not mean > 0:
        raise CalibrationError("All experts of a layer give the same for every token, so that their similarity is undefined.")
    # Four digits: a plan holds E * E of them a layer.
    return ((alike / mean).fill_diagonal_(1.0) * 1e4).round() / 1e4


def _medians(counts: Tensor) -> tuple[float, ...]:
    below = counts.cumsum(dim=1)
    centres = bin_centres()
    medians = []
    for row in below:
        pairs = int(row[-1])
        medians.append(float(centres[int(torch.searchsorted(row, (pairs + 1) // 2))]) if pairs else 1.0)
    return tuple(medians)
