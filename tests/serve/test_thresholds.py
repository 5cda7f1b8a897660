"""The tensors of a served model and what reads them; without vLLM."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modes_fx.errors import ServingError
from modes_fx.serve import thresholds as module
from modes_fx.serve.batch import classes_of, phases_of, visual_ids
from modes_fx.serve.cpu_experts import dispatch_kept
from modes_fx.serve.cpu_experts import skipping_apply as cpu_skipping_apply
from modes_fx.serve.thresholds import LayerThresholds, Thresholds
from modes_fx.serve.triton_experts import extended_map, skipping_apply

EXPERTS, TOP_K, MOST = 8, 2, 12
BOUNDS = torch.tensor([[[0.2, 0.6], [0.4, 0.8]], [[0.0, 0.5], [math.inf, 0.1]]])  # layers, phases, modalities


@pytest.fixture
def state() -> Thresholds:
    made = Thresholds([TOP_K, TOP_K], MOST, torch.device("cpu"))
    made.set_bounds(BOUNDS)
    return made


def routed(tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    weights = torch.rand(tokens, TOP_K, generator=generator)
    return weights, torch.randint(EXPERTS, (tokens, TOP_K), generator=generator, dtype=torch.int32)


def kept_by_hand(weights: Tensor, classes: list[int], layer: int) -> list[list[bool]]:
    bounds = BOUNDS[layer].flatten().tolist()
    return [[weight >= bounds[kind] for weight in row] for row, kind in zip(weights.tolist(), classes, strict=True)]


@pytest.mark.parametrize("layer", [0, 1])
def test_each_token_has_the_thresholds_of_its_layer_and_class(state: Thresholds, layer: int) -> None:
    classes = [0, 1, 1, 2, 3, 0]
    state.begin(torch.tensor(classes), len(classes))
    weights, ids = routed(6)
    found_weights, found_ids = LayerThresholds(state, layer, EXPERTS).keep(weights, ids)
    keep = torch.tensor(kept_by_hand(weights, classes, layer))
    assert torch.equal(found_weights, torch.where(keep, weights, 0))
    assert torch.equal(found_ids, torch.where(keep, ids, EXPERTS))
    assert found_ids.dtype == torch.int32


def test_padding_keeps_nothing_and_counts_nowhere(state: Thresholds) -> None:
    state.begin(torch.tensor([1, 2]), 8)
    weights, ids = routed(8)
    _, found = LayerThresholds(state, 0, EXPERTS).keep(weights, ids)
    assert (found[2:] == EXPERTS).all()
    kept = [sum(row) for row in kept_by_hand(weights[:2], [1, 2], 0)]
    assert state.pairs() == [0, 0, 2 * TOP_K, kept[1], 2 * TOP_K, kept[0], 0, 0]


def test_pairs_are_counted_over_layers_and_batches(state: Thresholds) -> None:
    wanted = dict.fromkeys(range(4), 0)
    tokens = dict.fromkeys(range(4), 0)
    for classes in ([0, 0, 1], [3], [2, 1, 1, 0, 3]):
        state.begin(torch.tensor(classes), len(classes))
        for layer in (0, 1):
            weights, ids = routed(len(classes))
            LayerThresholds(state, layer, EXPERTS).keep(weights, ids)
            for kind, row in zip(classes, kept_by_hand(weights, classes, layer), strict=True):
                wanted[kind] += sum(row)
        for kind in classes:
            tokens[kind] += 1
    order = (0, 2, 1, 3)  # modalities, then phases
    assert state.pairs() == [number for kind in order for number in (2 * TOP_K * tokens[kind], wanted[kind])]
    assert state.pairs() == state.pairs()


def test_a_dummy_run_keeps_all_and_counts_nothing(state: Thresholds) -> None:
    state.begin(torch.tensor([1]), 1)
    before = state.pairs()
    state.begin_dummy()
    weights, ids = routed(MOST)
    found = LayerThresholds(state, 0, EXPERTS).keep(weights, ids)
    assert torch.equal(found[0], weights)
    assert torch.equal(found[1], ids)
    assert state.pairs() == before


def test_a_batch_without_thresholds_is_idle_and_counted(state: Thresholds) -> None:
    layer = LayerThresholds(state, 1, EXPERTS)
    state.set_bounds(torch.tensor([0.0, 0.5, 0.5, 0.5]).view(1, 2, 2).expand(2, 2, 2))
    idle = []
    for classes in ([0, 0], [0, 1], [1], [0]):
        state.begin(torch.tensor(classes), len(classes))
        idle.append(state.idle)
    assert idle == [True, False, False, True]
    weights, ids = routed(1)
    found = layer.keep(weights, ids)
    assert torch.equal(found[0], weights)
    assert torch.equal(found[1], ids)
    assert state.pairs()[:2] == [4 * 2 * TOP_K, 3 * 2 * TOP_K]  # of the batch that was not idle, no layer ran
    state.set_bounds(torch.zeros(2, 2, 2))
    state.begin(torch.tensor([0, 1, 2, 3]), 6)
    assert state.idle
    state.begin_dummy()
    assert not state.idle


def test_an_idle_batch_is_stocks_own_call(state: Thresholds) -> None:
    given: list[dict[str, Any]] = []
    experts = SimpleNamespace(apply=lambda **arguments: given.append(arguments))
    apply = cpu_skipping_apply(experts, state, EXPERTS)
    state.set_bounds(torch.zeros(2, 2, 2))
    state.begin(torch.tensor([0]), 1)
    apply(output="o", topk_ids="i")
    assert given == [{"output": "o", "topk_ids": "i"}]


def test_another_number_of_tokens_than_the_batch_has(state: Thresholds) -> None:
    state.begin(torch.tensor([0, 1]), 4)
    with pytest.raises(ServingError, match="given 3 tokens of a batch of 4"):
        LayerThresholds(state, 0, EXPERTS).keep(*routed(3))


def test_a_layer_that_scales_its_sum_has_thresholds_on_what_it_scales(state: Thresholds) -> None:
    state.scales[1] = 1 / 2.5
    state.set_bounds(BOUNDS)
    torch.testing.assert_close(state.bounds[1, :4], BOUNDS[1].flatten() / 2.5)
    assert torch.equal(state.bounds[0, :4], BOUNDS[0].flatten())


def test_the_tensors_stay_where_they_are(state: Thresholds) -> None:
    """Compiled code and CUDA graphs hold their addresses."""
    before = [each.data_ptr() for each in (state.bounds, state.classes, state.kept)]
    state.set_bounds(BOUNDS + 1)
    state.begin(torch.tensor([0, 1]), 3)
    state.begin_dummy()
    assert [each.data_ptr() for each in (state.bounds, state.classes, state.kept)] == before


def test_the_operation_and_its_form_under_fake_tensors(state: Thresholds, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {"first": LayerThresholds(state, 0, EXPERTS)}
    monkeypatch.setattr(module, "_find", layers.__getitem__)
    state.begin(torch.tensor([0, 1, 2]), 3)
    torch.library.opcheck(torch.ops.modes_fx.serve_keep.default, (*routed(3), "first"))
    weights, ids = routed(3)
    found = torch.ops.modes_fx.serve_keep(weights, ids, "first")
    assert torch.equal(found[1], layers["first"].keep(weights, ids)[1])


def test_without_a_served_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_find", None)
    with pytest.raises(ServingError, match="serves no model in this process"):
        torch.ops.modes_fx.serve_keep(*routed(1), "first")


requests = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(1, 12)), min_size=1, max_size=6)


@given(requests)
def test_phases_are_positions_in_the_request(rows: list[tuple[int, int, int]]) -> None:
    """Chunks, mixed batches, cached prefixes, and requests computed anew, generated tokens and all."""
    wanted = [
        int(position >= prompt) for scheduled, computed, prompt in rows for position in range(computed, computed + scheduled)
    ]
    assert phases_of(*np.array(rows, dtype=np.int64).T).tolist() == wanted


def test_classes_are_phase_and_modality() -> None:
    ids = torch.tensor([5, 60, 63, 7, 60], dtype=torch.int32)
    phases = np.array([0, 0, 0, 1, 1])
    assert classes_of(phases, ids, torch.tensor([60, 63])).tolist() == [0, 1, 1, 2, 3]
    assert classes_of(phases, ids, torch.tensor([], dtype=torch.int32)).tolist() == [0, 0, 0, 2, 2]


def test_visual_placeholders_of_several_families() -> None:
    parts = SimpleNamespace(image_token_id=5, video_token_id=7), SimpleNamespace(media_placeholder_token_id=9)
    assert visual_ids([*parts, SimpleNamespace(image_token_index=-1, video_token_index=None)]) == (5, 7, 9)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
def test_kept_pairs_alone_reach_the_kernel(tokens: int, kept: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, matrices = torch.randn(tokens, 4, generator=generator), torch.randn(EXPERTS, 4, 4, generator=generator)
    weights, ids = routed(tokens)
    keep = torch.rand(tokens, TOP_K, generator=generator) < kept
    rows = []

    def kernel(output: Tensor, hidden: Tensor, weights_NK: Tensor, ids_NK: Tensor) -> None:
        rows.append(ids_NK.numel())
        outputs = torch.einsum("nkoh,nh->nko", matrices[ids_NK.long()], hidden)
        output.copy_((weights_NK.unsqueeze(2) * outputs).sum(1))

    found = torch.full_like(x, math.nan)
    dispatch_kept(kernel, found, x, torch.where(keep, weights, 0), torch.where(keep, ids, EXPERTS), EXPERTS)
    wanted = torch.zeros_like(x)
    for token, rank in keep.nonzero().tolist():
        wanted[token] += weights[token, rank] * (matrices[ids[token, rank]] @ x[token])
    torch.testing.assert_close(found, wanted)
    assert sum(rows) == int(keep.sum())


def test_dropped_pairs_are_of_an_expert_that_no_rank_has() -> None:
    cpu = torch.device("cpu")
    assert extended_map(None, 4, cpu).tolist() == [0, 1, 2, 3, -1]
    of_rank = torch.tensor([-1, -1, 0, 1], dtype=torch.int32)
    assert extended_map(of_rank, 4, cpu).tolist() == [-1, -1, 0, 1, -1]
    assert extended_map(of_rank, 4, cpu).dtype == torch.int32


def test_triton_experts_get_the_map_whatever_vllm_passes() -> None:
    given = {}
    experts = SimpleNamespace(apply=lambda **arguments: given.update(arguments))
    extended = extended_map(None, 4, torch.device("cpu"))
    skipping_apply(experts, 4, extended)(output="o", topk_ids="i", global_num_experts=4, expert_map=None)
    assert given == {"output": "o", "topk_ids": "i", "global_num_experts": 5, "expert_map": extended}


def test_nothing_on_the_way_to_the_experts_waits_for_the_device() -> None:
    """Tensors without memory refuse whatever would read one on the host, which is what a CUDA graph could not replay."""
    nowhere = torch.device("meta")
    state = Thresholds([TOP_K], MOST, nowhere)
    state.set_bounds(torch.ones(1, 2, 2))
    state.begin(torch.empty(3, dtype=torch.int64, device=nowhere), 8)
    weights = torch.empty(8, TOP_K, device=nowhere)
    found = LayerThresholds(state, 0, EXPERTS).keep(weights, weights.int())
    state.begin_dummy()
    assert [(each.shape, each.dtype) for each in found] == [((8, TOP_K), torch.float32), ((8, TOP_K), torch.int32)]
    with pytest.raises(NotImplementedError):
        state.pairs()
