"""Which tokens are text, vision and padding, in every way that a model can be called."""

import contextlib
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import modes_fx
from modes_fx import modality
from modes_fx.attach.watch import ModalityWatch
from modes_fx.errors import ModalityError
from modes_fx.graph.running import running
from modes_fx.modality import vision_token_ids
from tests import harness, oracle, tiny


def embeddings(length: int) -> dict[str, Tensor]:
    """Position ids too: this family computes them from the ids."""
    return {"inputs_embeds": torch.randn(1, length, 32), "position_ids": torch.arange(length).expand(3, 1, length)}


PLAN = modes_fx.SkipPlan.uniform(text=0.25, vision=0.4)


class Spy:
    """Notes what each MoE layer would be told."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[tuple[list[list[int]], str]] = []
        self.required = True
        self.handle = oracle.experts_of(model)[0].register_forward_pre_hook(self._note)

    def _note(self, *args: Any) -> None:
        tokens = running()
        if tokens is None:
            assert not self.required
            return
        self.seen.append((tokens.ids.tolist(), tokens.phase))


@pytest.fixture(scope="module")
def watched() -> Iterator[tuple[nn.Module, Spy]]:
    """An optimised model whose experts are suspended: blocks run as they are."""
    model = tiny.make()
    modes_fx.optimize(model, PLAN)
    model._modes_fx.runtime.suspended = True
    spy = Spy(model)
    yield model, spy
    spy.handle.remove()
    modes_fx.restore(model)


def seen(watched: tuple[nn.Module, Spy], **inputs: Any) -> tuple[list[list[int]], str]:
    model, spy = watched
    spy.seen.clear()
    with torch.no_grad():
        model(**inputs)
    assert running() is None
    (call,) = spy.seen
    return call


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_told_from_text_and_images(watched: Any, side: str) -> None:
    inputs = tiny.mixed_batch(side=side)
    ids, phase = seen(watched, **inputs)
    assert ids == tiny.classes(inputs).tolist()
    assert phase == "prefill"
    assert {0, 1, 2} == {value for row in ids for value in row}


def test_several_images_count_token_by_token(watched: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = tiny.batch([tiny.image_row(2, 3, 2, generator)])
    ids, _ = seen(watched, **inputs)
    assert ids[0].count(1) == 12
    assert ids == tiny.classes(inputs).tolist()


def test_text_alone_is_text(watched: Any) -> None:
    assert seen(watched, **tiny.text_batch(2, 5)) == ([[0] * 5] * 2, "prefill")


def test_decoding_with_a_cache_is_text_and_its_padding_is_not_forgotten(watched: Any) -> None:
    model, spy = watched
    inputs = tiny.mixed_batch()
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        spy.seen.clear()
        mask = torch.cat([inputs["attention_mask"], torch.tensor([[1], [1], [0]])], dim=1)
        model(
            input_ids=torch.tensor([[5], [tiny.IMAGE], [7]]),
            past_key_values=cache,
            attention_mask=mask,
            position_ids=torch.full((3, 3, 1), 18),
        )
    assert spy.seen == [([[0], [0], [2]], "decode")]


def test_generate_is_one_prefill_and_then_decode_steps(watched: Any) -> None:
    model, spy = watched
    inputs = tiny.mixed_batch()
    spy.seen.clear()
    model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert [phase for _, phase in spy.seen] == ["prefill", "decode", "decode", "decode"]
    assert spy.seen[0][0] == tiny.classes(inputs).tolist()
    assert all(ids == [[0]] * 3 for ids, _ in spy.seen[1:])


def test_a_first_forward_of_one_token_is_a_prefill(watched: Any) -> None:
    assert seen(watched, input_ids=torch.tensor([[5]])) == ([[0]], "prefill")


def test_arguments_by_position_are_understood(watched: Any) -> None:
    model, spy = watched
    inputs = tiny.text_batch(1, 4)
    spy.seen.clear()
    with torch.no_grad():
        model(inputs["input_ids"], torch.tensor([[0, 1, 1, 1]]))
    assert spy.seen == [([[2, 0, 0, 0]], "prefill")]


def test_embeddings_with_an_explicit_mask(watched: Any) -> None:
    embeds = embeddings(4)
    with modes_fx.token_modality(torch.tensor([[0, 1, 1, 2]])):
        assert seen(watched, **embeds) == ([[0, 1, 1, 2]], "prefill")
    with modes_fx.token_modality(torch.tensor([[False, True, True, False]])):
        assert seen(watched, **embeds)[0] == [[0, 1, 1, 0]]


def test_an_explicit_mask_joins_with_padding_and_leaves_forwards_of_other_shapes_alone(watched: Any) -> None:
    with modes_fx.token_modality(torch.tensor([[1, 1, 0]])):
        mask = torch.tensor([[0, 1, 1]])
        assert seen(watched, **embeddings(3), attention_mask=mask)[0] == [[2, 1, 0]]
        assert seen(watched, **tiny.text_batch(1, 5))[0] == [[0] * 5]


def test_embeddings_without_any_information_run_while_nothing_is_skipped(watched: Any) -> None:
    model, spy = watched
    modes_fx.set_plan(model, None)
    spy.required = False
    try:
        with torch.no_grad():
            assert model(**embeddings(4)).logits.isfinite().all()
    finally:
        spy.required = True
        modes_fx.set_plan(model, PLAN)


def test_embeddings_without_any_information_are_an_error_that_says_what_to_do(watched: Any) -> None:
    with pytest.raises(ModalityError, match=r"\[1, 4\].*modes_fx\.token_modality"):
        seen(watched, **embeddings(4))
    with (
        modes_fx.token_modality(torch.tensor([[0, 1]])),
        pytest.raises(ModalityError, match=r"token_modality\(\) was given \[1, 2\]"),
    ):
        seen(watched, **embeddings(4))
    assert running() is None


def test_embeddings_need_no_information_while_everything_is_kept(watched: Any) -> None:
    model, spy = watched
    modes_fx.set_plan(model, None)
    spy.required = False
    try:
        with torch.no_grad():
            out = model.model.language_model(**embeddings(4)).last_hidden_state
    finally:
        spy.required = True
        modes_fx.set_plan(model, PLAN)
    assert torch.isfinite(out).all()
    assert running() is None


def test_a_forward_without_ids_and_embeddings_is_an_error_that_names_them(watched: Any) -> None:
    model, _ = watched
    with pytest.raises(ModalityError, match="input_ids nor inputs_embeds"):
        model(attention_mask=torch.ones(1, 3))
    assert running() is None


@pytest.mark.parametrize("shape", [(1, 3), (2, 4), (5,), (2, 3, 5)])
def test_a_mask_of_the_wrong_shape_is_an_error_before_anything_runs(watched: Any, shape: tuple[int, ...]) -> None:
    model, spy = watched
    spy.seen.clear()
    ran = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda *args: ran.append(args))
    try:
        with pytest.raises(ModalityError, match=re.escape(str(list(shape)))):
            model(input_ids=torch.full((2, 5), 3), attention_mask=torch.ones(shape))
    finally:
        handle.remove()
    assert not ran
    assert not spy.seen
    assert running() is None


@pytest.mark.parametrize(
    "ids", [torch.zeros(3), torch.zeros(1, 3), torch.tensor([[0, 3]]), torch.tensor([[-1, 0]]), torch.zeros(1, 2, 2).long()]
)
def test_token_modality_takes_only_small_integers_of_two_dimensions(ids: Tensor) -> None:
    with pytest.raises(ModalityError, match="token_modality"), modes_fx.token_modality(ids):
        pytest.fail("entered")
    assert modality.explicit() is None


def test_token_modality_ends_with_its_block_and_nests() -> None:
    outer, inner = torch.tensor([[0]]), torch.tensor([[1]])
    with modes_fx.token_modality(outer):
        with modes_fx.token_modality(inner):
            assert modality.explicit().equal(inner)
        assert modality.explicit().equal(outer)
        with contextlib.suppress(KeyError), modes_fx.token_modality(inner):
            raise KeyError
        assert modality.explicit().equal(outer)
    assert modality.explicit() is None


def test_an_exception_inside_the_forward_leaves_nothing_behind(watched: Any) -> None:
    model, _ = watched

    def fail(*args: Any) -> None:
        raise RuntimeError("inside")

    handle = oracle.experts_of(model)[1].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="inside"):
            model(**tiny.mixed_batch())
    finally:
        handle.remove()
    assert running() is None
    inputs = tiny.text_batch(1, 3)
    assert seen(watched, **inputs)[0] == [[0, 0, 0]]


def test_the_inner_model_may_be_called_itself(watched: Any) -> None:
    model, spy = watched
    inputs = tiny.mixed_batch()
    spy.seen.clear()
    with torch.no_grad():
        model.model(**inputs)
    assert spy.seen == [(tiny.classes(inputs).tolist(), "prefill")]
    assert running() is None


def test_placeholder_ids_are_read_from_the_config() -> None:
    assert vision_token_ids(tiny.make().config) == (tiny.IMAGE, 63)
    assert vision_token_ids(transformers.AriaConfig(image_token_index=9)) == (9,)
    assert vision_token_ids(tiny.make("mixtral").config) == ()
    assert vision_token_ids(None) == ()


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_padding_in_front_is_told_over_any_cache_that_generate_makes(watched: Any, kind: str) -> None:
    model, spy = watched
    inputs = tiny.batch([[5, 6, 7], [8]])
    spy.seen.clear()
    model.generate(**inputs, max_new_tokens=2, do_sample=False, cache_implementation=kind, disable_compile=True)
    assert spy.seen == [([[0, 0, 0], [2, 2, 0]], "prefill"), ([[0], [0]], "decode")]


@pytest.mark.parametrize("masked", [torch.bool, torch.float32])
def test_a_token_that_may_look_at_nothing_is_padding(watched: Any, masked: torch.dtype) -> None:
    may_look = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    may_look[..., 0] = False
    mask = may_look if masked == torch.bool else torch.zeros(may_look.shape).masked_fill(~may_look, torch.finfo(masked).min)
    ids = torch.tensor([[5, 6, 7]])
    assert seen(watched, input_ids=ids, attention_mask=mask) == ([[2, 0, 0]], "prefill")
    told = ModalityWatch._with_padding
    assert told(torch.zeros_like(ids), {"full_attention": None, "sliding_attention": mask}).tolist() == [[2, 0, 0]]
    assert told(torch.zeros_like(ids), {"full_attention": None}).tolist() == [[0, 0, 0]]
    assert told(torch.zeros_like(ids), may_look.long()).tolist() == [[0, 0, 0]]  # whose numbers may mean either


@pytest.mark.usefixtures("without_inductor")
def test_calls_from_several_threads_at_once_do_not_mix(optimized_vlm: nn.Module) -> None:
    modes_fx.set_plan(optimized_vlm, PLAN)
    batches = [tiny.mixed_batch(seed=1), tiny.mixed_batch(side="right", seed=2), tiny.text_batch(3, 18, seed=3)]
    alone = [harness.logits(optimized_vlm, inputs) for inputs in batches]
    repeats = 12
    start, results = threading.Barrier(len(batches)), [[] for _ in batches]

    def work(index: int) -> None:
        start.wait()
        results[index].extend(harness.logits(optimized_vlm, batches[index]) for _ in range(repeats))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, many in zip(alone, results, strict=True):
        assert len(many) == repeats
        assert all(result.equal(one) for result in many)


@pytest.mark.usefixtures("without_inductor")
def test_a_block_called_with_other_tokens_than_the_forward_has_is_an_error(optimized_vlm: nn.Module) -> None:
    modes_fx.set_plan(optimized_vlm, PLAN)
    block = optimized_vlm.model.language_model.layers[0].mlp

    def call_with_more(*args: Any) -> None:
        block(torch.zeros(1, 50, 32))

    handle = optimized_vlm.model.language_model.norm.register_forward_pre_hook(call_with_more)
    try:
        with pytest.raises(ModalityError, match=r"50 tokens.*\[1, 4\]"):
            harness.logits(optimized_vlm, tiny.text_batch(1, 4))
    finally:
        handle.remove()
    assert running() is None


@pytest.mark.usefixtures("without_inductor")
def test_a_block_called_outside_any_forward_is_an_error_once_the_modality_matters(optimized_vlm: nn.Module) -> None:
    block, hidden = optimized_vlm.model.language_model.layers[0].mlp, torch.zeros(1, 3, 32)
    with torch.no_grad():
        assert torch.isfinite(block(hidden)).all()
        modes_fx.set_plan(optimized_vlm, PLAN)
        with pytest.raises(ModalityError, match="outside a forward"):
            block(hidden)
