"""What the kernels take and what not: rows that have to be there, work before the routing weights, other layouts of weights."""

import pytest
import torch
from torch import Tensor

from tests import harness
from tests.passes.near_misses import HIDDEN, Step, dispatch, inputs


def changed(rows: Tensor) -> Tensor:
    rows.mul_(2)
    return rows


def changed_through_a_view(rows: Tensor) -> Tensor:
    rows.view(-1, HIDDEN, 1).mul_(2)
    return rows


def changed_through_a_cast(rows: Tensor) -> Tensor:
    rows.to(rows.dtype).mul_(2)
    return rows


def run(rows: Step, body: Step, transposed: bool = True, turned: bool = False) -> tuple[Tensor, Tensor, str]:
    """Return what the rewritten dispatch computes with everything kept, what it did before, and which GEMMs it has."""
    *routed, w1, w2 = inputs()
    w1, w2 = (w1.mT.contiguous(), w2.mT.contiguous()) if transposed or turned else (w1, w2)
    given = (*routed, w1.mT, w2.mT) if turned else (*routed, w1, w2)

    def function(hidden: Tensor, ids: Tensor, shares: Tensor, up: Tensor, down: Tensor) -> Tensor:
        up, down = (up.transpose(-2, -1), down.transpose(-2, -1)) if transposed else (up, down)
        return dispatch(hidden, ids, shares, up, down, rows=rows, body=body)

    runtime = harness.FixedRuntime()
    with torch.no_grad():
        out = harness.compiled_block(function, "compact", runtime)(*given)
        wanted = function(*given)
    ((record,),) = runtime.graphs
    return out, wanted, record.gemms


@pytest.mark.parametrize("rows", [lambda x: x, changed, changed_through_a_view, changed_through_a_cast, lambda x: x * 2])
@pytest.mark.parametrize("body", [lambda y: y, lambda y: y + 1, changed], ids=["direct", "added", "changed"])
def test_work_around_the_gemms_is_done(rows: Step, body: Step) -> None:
    out, wanted, gemms = run(rows, body)
    assert gemms == "kernels"
    assert (out - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_weights_along_their_outer_dimension_are_left_to_aten() -> None:
    out, wanted, gemms = run(lambda x: x, lambda y: y, transposed=False)
    assert gemms == "its weights lie along their outer dimension: optimize(..., prepack=True) turns them"
    assert (out - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("rows", [lambda x: x, changed], ids=["direct", "changed"])
@pytest.mark.parametrize("body", [lambda y: y, lambda y: y + 1], ids=["direct", "added"])
def test_weights_stored_transposed_are_taken_once_they_are_turned(rows: Step, body: Step) -> None:
    out, wanted, gemms = run(rows, body, transposed=False, turned=True)
    assert gemms == "kernels"
    assert (out - wanted).abs().max() <= 1e-5 * wanted.abs().max()
