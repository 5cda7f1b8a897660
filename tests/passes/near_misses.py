"""The two dispatches of transformers in small, any step of which a test may change."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import harness

TOKENS, TOP_K, EXPERTS, HIDDEN = 5, 3, 4, 32
GMM = torch.ops.transformers.grouped_mm_fallback

Step = Callable[[Tensor], Any]


def same(value: Tensor) -> Tensor:
    return value


def dispatch(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    rows: Step = same,
    body: Step = same,
    weight: Step = same,
    pairs: Step = same,
    total: Step | None = None,
    on_input: bool = False,
    leak: str = "",
    counted: str = "ids",
    use_offsets: bool = False,
    order: Step = same,
) -> Any:
    """The dispatch of transformers, with one step changed."""
    tokens, k = ids.shape
    flat = weights.reshape(-1)
    sorted_ids, perm = torch.sort(ids.reshape(-1))
    pair_token = perm // k
    x = rows(hidden[pair_token])
    w = flat[perm]
    histogram = torch.histc(
        {"ids": sorted_ids, "unsorted": ids.reshape(-1), "hidden": hidden}[counted].float(),
        bins=EXPERTS,
        min=0,
        max=EXPERTS - 1,
    )
    offsets = torch.cumsum(histogram, dim=0, dtype=torch.int32)
    if on_input:
        x = x * w.unsqueeze(-1)
    y = body(GMM(torch.nn.functional.silu(GMM(x, w1, offs=offsets)), w2, offs=offsets))
    weighted = y if on_input else y * weight(w).unsqueeze(-1)
    inverse = torch.empty_like(perm)
    inverse[perm] = order(torch.arange(perm.size(0)))
    restored = pairs(weighted[inverse])
    out = total(restored) if total else restored.view(tokens, k, hidden.shape[1]).sum(dim=1)
    if use_offsets:
        out = out + offsets.sum()
    leaks = {
        "perm": perm, "pair_token": pair_token, "sorted_ids": sorted_ids, "w": w, "weighted": weighted, "restored": restored,
        "y": y, "offsets": offsets, "histogram": histogram,
    }  # fmt: skip
    return (out, leaks[leak]) if leak else out


def batched(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    body: Step = same,
    weight: Step = same,
    pairs: Step = same,
    total: Step | None = None,
    on_input: bool = False,
    leak: str = "",
    repeat: Step | None = None,
    second: Step = same,
) -> Any:
    """The dispatch of transformers' ``batched_mm``, with one step changed."""
    tokens, k = ids.shape
    x = repeat(hidden) if repeat else hidden.repeat_interleave(k, dim=0)
    w = weights.reshape(-1)
    flat_ids = ids.reshape(-1)
    if on_input:
        x = x * w.unsqueeze(-1)
    y = torch.nn.functional.silu(torch.bmm(x.unsqueeze(1), w1[flat_ids]).squeeze(1))
    y = body(torch.bmm(y.unsqueeze(1), w2[second(flat_ids)]).squeeze(1))
    weighted = y if on_input else y * weight(w).unsqueeze(-1)
    restored = pairs(weighted)
    out = total(restored) if total else restored.view(tokens, k, hidden.shape[1]).sum(dim=1)
    return (out, {"w": w, "y": y, "weighted": weighted, "flat_ids": flat_ids, "x": x}[leak]) if leak else out


STOCK = {"grouped_mm": dispatch, "batched_mm": batched}


def inputs(hidden: int = HIDDEN) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    scores, ids = torch.topk(torch.rand(TOKENS, EXPERTS, generator=generator), TOP_K)
    x = torch.randn(TOKENS, hidden, generator=generator)
    return (
        x,
        ids,
        scores,
        torch.randn(EXPERTS, hidden, 8, generator=generator),
        torch.randn(EXPERTS, 8, hidden, generator=generator),
    )


def refused(function: Callable[..., Any], *args: Any, dispatch: str = "compact") -> str:
    """Assert that nothing is rewritten, and return the reason."""
    found = harness.capture(function, *args, dispatch=dispatch)
    (record,) = found.records
    if record.status == "rewritten":
        pytest.fail("it was rewritten")
    assert harness.text(found.module) == found.marked.marked_text
    assert record.status == "rejected"
    assert record.detail
    return record.code


def variant(form: str = "compact", stock: str = "grouped_mm", **changes: Any) -> str:
    return refused(functools.partial(STOCK[stock], **changes), *inputs(), dispatch=form)
