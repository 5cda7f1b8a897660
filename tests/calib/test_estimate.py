"""The estimate is the second-order expansion that it says it is."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modes_fx
from modes_fx.calib import layer_importance
from modes_fx.calib.estimate import estimate
from modes_fx.calib.objective import Answers
from modes_fx.errors import CalibrationError
from tests import oracle, tiny
from tests.calib.conftest import Batch
from tests.harness import model_state

pytestmark = pytest.mark.usefixtures("without_inductor")


@pytest.fixture
def unsure() -> nn.Module:
    """A model whose answers are no foregone conclusions: few samples of them say much."""
    model = tiny.make()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
    return model


def curvature(model: nn.Module, batch: Batch, layer: int, modality: int, step: float = 0.03) -> float:
    """Return KL(p || p with a routed contribution shrunk by a small step) / step^2, summed over answers; in float64."""
    model = model.double()
    model.set_experts_implementation("eager")
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    mask = (tiny.classes(batch).reshape(-1, 1) == modality).double()

    def shrink(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * (1 - step * mask)

    answers = Answers(model)
    whole, _ = answers(batch)
    handle = oracle.experts_of(model)[layer].register_forward_hook(shrink)
    shrunk, _ = answers(batch)
    handle.remove()
    log_p, log_q = torch.log_softmax(whole, -1), torch.log_softmax(shrunk, -1)
    return float((log_p.exp() * (log_p - log_q)).sum()) / step**2


def test_it_is_the_curvature_of_the_divergence(unsure: nn.Module, batches: list[Batch]) -> None:
    modes_fx.optimize(unsure)
    found, tokens, cost = estimate(unsure, batches[:1], ((0,), (1,)), samples=200)
    modes_fx.restore(unsure)
    assert (tokens, cost) == (6, 201.0)
    for layer, modality in ((0, 0), (0, 1), (1, 0)):
        assert float(found[layer, modality]) == pytest.approx(curvature(unsure, batches[0], layer, modality), rel=0.25)
    assert float(found[1, 1]) == 0.0  # visual tokens of the last layer


def test_paper_mode_scales_a_layer_as_a_whole(unsure: nn.Module, batches: list[Batch]) -> None:
    importance = layer_importance(unsure, batches, "paper", method="estimate")
    assert (importance.method, importance.forwards, importance.answer_tokens) == ("estimate", 5.0, 12)
    assert all(text == vision > 0 for text, vision in importance.kl)


def test_the_same_draws_give_the_same_estimate_and_no_trace_is_left(unsure: nn.Module, batches: list[Batch]) -> None:
    before, wanted = model_state(unsure), [parameter.requires_grad for parameter in unsure.parameters()]
    first, second = (layer_importance(unsure, batches, method="estimate") for _ in range(2))
    assert first.kl == second.kl
    assert model_state(unsure) == before
    assert [parameter.requires_grad for parameter in unsure.parameters()] == wanted
    assert all(parameter.grad is None for parameter in unsure.parameters())


def test_experts_that_run_twice_are_refused(unsure: nn.Module, batches: list[Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    block = unsure.model.language_model.layers[0].mlp
    modes_fx.optimize(unsure)
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda hidden: forward(hidden) + forward(hidden))
    with pytest.raises(CalibrationError, match='Use method="resumed"'):
        layer_importance(unsure, batches, method="estimate")


def test_an_unknown_method_is_refused_with_the_known_ones(model: nn.Module, batches: list[Batch]) -> None:
    with pytest.raises(CalibrationError, match=r"'fast'; known: resumed, naive, estimate"):
        layer_importance(model, batches, method="fast")
