"""What the rivals take from calibration data, against loops over the tokens of an eager model."""

import statistics

import pytest
import torch
from torch import Tensor, nn

import modes_fx
from modes_fx.calib.routing import RoutingRecorder, bin_centres
from modes_fx.measure.compare import routing_statistics
from modes_fx.measure.compare.statistics import linear_cka
from tests import harness, oracle, tiny
from tests.calib.conftest import Batch, with_answers, without_labels
from tests.models.convert import cases

pytestmark = pytest.mark.usefixtures("without_inductor")

DATA: list[Batch] = [with_answers(1), with_answers(2, side="right")]


def weights_by_layer() -> list[list[list[float]]]:
    """Sorted weights of each real token, of each layer."""
    stock = oracle.Oracle(tiny.make(), None)
    for batch in DATA:
        stock(tiny.classes(batch), **without_labels(batch))
    real = torch.cat([tiny.classes(batch).flatten() != 2 for batch in DATA])
    return [torch.cat(found)[real].sort(descending=True).values.tolist() for found in stock.weights]


def test_medians_are_those_of_all_tokens_and_ranks_behind_the_first(vlm: nn.Module) -> None:
    found = routing_statistics(modes_fx.optimize(vlm), DATA, similarity=False)
    for layer, tokens in enumerate(weights_by_layer()):
        shares = [sum(token[rank:]) / sum(token) for token in tokens for rank in range(1, len(token))]
        ratios = [token[rank] / token[0] for token in tokens for rank in range(1, len(token))]
        assert found.tail_share[layer] == pytest.approx(statistics.median_low(shares), rel=2**-7)
        assert found.ratio_to_first[layer] == pytest.approx(statistics.median_low(ratios), rel=2**-7)
    assert found.similarity == ()


def test_experts_that_compute_the_same_are_more_alike_than_others(vlm: nn.Module) -> None:
    experts = oracle.experts_of(vlm)[1]
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter[4] = parameter[2]
    found = routing_statistics(modes_fx.optimize(vlm), DATA, tokens=30)
    table = torch.tensor(found.similarity[1])
    assert table.shape == (6, 6)
    assert table.equal(table.T)
    assert table.diagonal().tolist() == [1.0] * 6
    others = ~torch.eye(6, dtype=torch.bool)
    assert table[2, 4] == table[others].max() > 1.0
    assert float(table[others].mean()) == pytest.approx(1.0, abs=1e-3)
    assert modes_fx.report(vlm).rewritten  # and it still runs


def test_cka_is_one_up_to_rotation_and_scale_and_small_between_unrelated() -> None:
    outputs = torch.randn(3, 200, 4, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    outputs[1] = 3 * outputs[0] @ rotation + 5
    found = linear_cka(outputs)
    assert found.diagonal().tolist() == pytest.approx([1.0] * 3)
    assert float(found[0, 1]) == pytest.approx(1.0)
    assert float(found[0, 2]) < 0.1
    assert float(found[0, 2]) == pytest.approx(_by_definition(outputs[0], outputs[2]))


def _by_definition(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    return float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def test_one_expert_a_token_has_no_rank_behind_the_first() -> None:
    model = tiny.qwen3_vl_moe(num_experts_per_tok=1).eval()
    found = routing_statistics(modes_fx.optimize(model), DATA, similarity=False)
    assert found.tail_share == found.ratio_to_first == (1.0, 1.0)


@pytest.mark.parametrize("form", ["deepseek", "deepseek_flat"])  # ids and weights [T, K], and flat
def test_converted_blocks_show_the_weights_that_their_routers_give(form: str) -> None:
    case = cases.CASES[form]
    inputs = case.inputs()
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    stock = cases.Oracle(case, None)
    stock(inputs)
    model = modes_fx.optimize(case.make())
    with RoutingRecorder(model) as recorder:
        harness.logits(model, inputs)
    for counts, wanted in zip(recorder.counts[:, 0], stock.weights, strict=True):
        assert bin_centres().repeat_interleave(counts).tolist() == pytest.approx(wanted.sort().values.tolist(), rel=2**-7)
    found = routing_statistics(model, [{**inputs, "labels": labels}], tokens=8)
    for layer, weights in enumerate(stock.weights):
        ratios = [w / max(token) for token in weights.view(-1, 3).tolist() for w in sorted(token)[:-1]]
        assert found.ratio_to_first[layer] == pytest.approx(statistics.median_low(ratios), rel=2**-7)
        assert torch.tensor(found.similarity[layer]).shape == (8, 8)
