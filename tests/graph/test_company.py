"""An optimised model among all that people do with models: training, wrapping, saving, generating in every way, threads."""

import copy
import gc
import inspect
import io
import pickle
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import modes_fx
from modes_fx.errors import ModelError
from modes_fx.graph import regions
from modes_fx.plan import SkipPlan
from tests import harness, oracle, tiny
from tests.harness import logits, relative_error

pytestmark = [
    pytest.mark.usefixtures("without_inductor"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # dynamo hides it, if it may
]

PLAN = SkipPlan.uniform(text=0.25, vision=0.4)
OTHER = SkipPlan.uniform(text=0.5, vision=0.1)
ALL = SkipPlan.uniform(text=float("inf"), vision=float("inf"))
INPUTS = tiny.mixed_batch(seed=5)
REAL = tiny.classes(INPUTS) != 2


def text_model(plan: SkipPlan | None = None) -> nn.Module:
    return modes_fx.optimize(tiny.make("qwen3_moe"), plan)


@pytest.fixture(scope="module")
def optimized_text() -> Iterator[nn.Module]:
    """One optimised text model for tests that change its plan alone."""
    with pytest.MonkeyPatch.context() as patch:
        harness.compile_with(patch, harness.uncompiled)
        model = text_model()
    yield model
    modes_fx.restore(model)


def judged(model: nn.Module, inputs: dict[str, Tensor], plan: SkipPlan, dtype: torch.dtype = torch.float32) -> oracle.Oracle:
    """An oracle of the plan that knows the inputs' classes, so that its model can be called with gradients."""
    judge = oracle.Oracle(model, plan.bounds(2), dtype)
    judge(tiny.classes(inputs), **inputs, use_cache=False)
    return judge


# ---------------------------------------------------------------- training


def test_autocast_skips_what_the_oracle_skips_in_it(vlm: nn.Module) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        judge = judged(vlm, INPUTS, PLAN)
        expected = logits(judge.model, INPUTS)
        with modes_fx.stats(modes_fx.optimize(vlm, PLAN)) as stats:
            actual = logits(vlm, INPUTS)
    assert actual.dtype == expected.dtype
    assert relative_error(actual, expected, REAL) <= 0.03
    assert 0 < stats.skip_ratio() < 1
    assert (stats.pairs_kept - judge.kept / 2).abs().max() <= 1


@pytest.mark.parametrize("region", ["moe", "model"])
def test_gradients_are_those_of_the_stock_model_with_dropped_weights_at_0(vlm: nn.Module, region: Any) -> None:
    judge = judged(vlm, INPUTS, PLAN)
    modes_fx.optimize(vlm.train(), PLAN, region=region)
    losses = []
    for model in (judge.model.train(), vlm):
        loss = model(**INPUTS, labels=INPUTS["input_ids"], use_cache=False).loss
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    compare_gradients(vlm, judge.model)


def compare_gradients(actual: nn.Module, expected: nn.Module) -> None:
    theirs = dict(expected.named_parameters())
    for name, parameter in actual.named_parameters():
        wanted = theirs[name].grad
        assert (parameter.grad is None) == (wanted is None), name
        if wanted is not None:
            assert (parameter.grad - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 1e-6, name


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def optimized_then_wrapped(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(modes_fx.optimize(model, PLAN), find_unused_parameters=True)


def wrapped_then_its_model_optimized(model: nn.Module) -> nn.Module:
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    modes_fx.optimize(wrapped.module, PLAN)
    return wrapped


def wrapped_then_optimized(model: nn.Module) -> nn.Module:
    return modes_fx.optimize(DistributedDataParallel(model, find_unused_parameters=True), PLAN)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("order", [optimized_then_wrapped, wrapped_then_its_model_optimized, wrapped_then_optimized])
def test_data_parallel_training(order: Callable[[nn.Module], nn.Module]) -> None:
    model, inputs = tiny.make("qwen3_moe").train(), tiny.text_batch()
    judge = judged(model, inputs, PLAN)
    wrapped = order(model)
    for each in (judge.model.train(), wrapped):
        each(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    compare_gradients(model, judge.model)
    assert relative_error(logits(wrapped, inputs), logits(judge.model, inputs), inputs["input_ids"] >= 0) <= 1e-5


# ---------------------------------------------------------------- low-rank adapters

EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}
ATTENTION = {"target_modules": ["q_proj"]}
BOTH = {**EXPERTS, **ATTENTION}


def adapted(model: nn.Module, where: dict[str, Any]) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    with warnings.catch_warnings():  # its own, of names that transformers deprecates
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **where)
        wrapped: nn.Module = peft.get_peft_model(model, config)
    return wrapped


def adapted_oracle(where: dict[str, Any]) -> nn.Module:
    """A stock model with adapters, whose experts never get a weight below the text's threshold."""
    wrapped = adapted(tiny.make("qwen3_moe"), where)
    wrapped.get_base_model().set_experts_implementation("eager")

    def silence(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, ids, weights = (*args, *kwargs.values())
        return (hidden, ids, weights.where(weights >= 0.25, torch.zeros_like(weights))), {}

    for experts in oracle.experts_of(wrapped):
        experts.register_forward_pre_hook(silence, with_kwargs=True)
    return wrapped


def compare_adapted(actual: nn.Module, expected: nn.Module) -> None:
    inputs = tiny.text_batch()
    assert relative_error(logits(actual, inputs), logits(expected, inputs), inputs["input_ids"] >= 0) <= 1e-5
    for each in (actual, expected):
        each.train()(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    compare_gradients(actual, expected)
    assert [name for name, parameter in actual.named_parameters() if parameter.grad is not None and "lora" in name]


@pytest.mark.parametrize("where", [ATTENTION, EXPERTS, BOTH], ids=["attention", "experts", "both"])
def test_adapters_that_were_there_before(where: dict[str, Any]) -> None:
    model = adapted(tiny.make("qwen3_moe"), where)
    modes_fx.optimize(model.get_base_model(), PLAN)
    compare_adapted(model, adapted_oracle(where))


@pytest.mark.parametrize("region", ["moe", "model"])
def test_adapters_of_attention_that_come_later(region: Any) -> None:
    model = adapted(modes_fx.optimize(tiny.make("qwen3_moe"), PLAN, region=region), ATTENTION)
    compare_adapted(model, adapted_oracle(ATTENTION))


def test_adapters_of_experts_that_come_later_are_refused_until_optimised_again() -> None:
    model = adapted(modes_fx.optimize(tiny.make("qwen3_moe"), PLAN), EXPERTS)
    with pytest.raises(ModelError, match="cannot be traced as one graph"):
        logits(model, tiny.text_batch())
    modes_fx.optimize(model.get_base_model(), PLAN)
    compare_adapted(model, adapted_oracle(EXPERTS))


# ---------------------------------------------------------------- generate

WAYS: dict[str, dict[str, Any]] = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 3},
    "chunked prefill of one": {"prefill_chunk_size": 1},
    "scores": {"output_scores": True, "return_dict_in_generate": True},
}


def generated(model: nn.Module, inputs: dict[str, Tensor], **settings: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(**inputs, max_new_tokens=8, **{"do_sample": False, **settings})


@pytest.mark.parametrize("plan", [None, PLAN], ids=["all kept", "plan"])
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_generate_that_change_no_token(optimized_text: nn.Module, way: str, plan: SkipPlan | None) -> None:
    inputs = {"input_ids": torch.tensor([[5, 9, 7, 5, 9, 7, 5, 9]])}
    model = modes_fx.set_plan(optimized_text, plan)
    plain = generated(model, inputs)
    with modes_fx.stats(model).reset() as stats:
        actual = generated(model, inputs, **WAYS[way])
    assert getattr(actual, "sequences", actual).equal(plain)
    assert (stats.skip_ratio() > 0) == (plan is not None)
    if plan is None:
        assert plain.equal(generated(tiny.make("qwen3_moe"), inputs))


SETTINGS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "beams sampled": {"num_beams": 2, "do_sample": True, "top_k": 20},
    "several": {"num_return_sequences": 3, "do_sample": True, "top_p": 0.9},
    "guided": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("way", SETTINGS)
def test_ways_to_generate_as_the_oracle(optimized_text: nn.Module, way: str) -> None:
    model, inputs = modes_fx.set_plan(optimized_text, PLAN), tiny.text_batch(1)
    judge = judged(tiny.make("qwen3_moe"), inputs, PLAN)
    judge._told = lambda name, tokens: (torch.zeros(tokens, dtype=torch.int64), 0)
    assert generated(model, inputs, **SETTINGS[way]).equal(generated(judge.model, inputs, **SETTINGS[way]))


@pytest.mark.parametrize("who", ["both", "model", "assistant"])
def test_assisted_decoding(optimized_text: nn.Module, who: str) -> None:
    inputs = tiny.text_batch(1, 6)
    model, assistant = modes_fx.set_plan(optimized_text, PLAN), tiny.make("qwen3_moe")
    if who == "assistant":
        model = tiny.make("qwen3_moe")
    plain = generated(model, inputs)
    if who != "model":
        modes_fx.optimize(assistant, ALL)
    assert generated(model, inputs, assistant_model=assistant).equal(plain)


@pytest.mark.parametrize("plan", [None, PLAN], ids=["all kept", "plan"])
def test_continuous_batching(optimized_text: nn.Module, plan: SkipPlan | None) -> None:
    prompts = [[5, 9, 7, 5, 9], [3, 4, 5], [20, 21, 22, 23, 24, 25, 26]]
    model = modes_fx.set_plan(optimized_text, plan)
    plain = [generated(model, {"input_ids": torch.tensor([prompt])})[0, len(prompt) :].tolist() for prompt in prompts]
    config = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=tiny.PAD)
    pages = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)
    with modes_fx.stats(model).reset() as stats:
        answers = model.generate_batch(prompts, generation_config=config, continuous_batching_config=pages, warmup=False)
    in_order = [answers[name] for name in sorted(answers)]
    assert [(answer.error, answer.generated_tokens) for answer in in_order] == [(None, tokens) for tokens in plain]
    assert int(stats.pairs_routed[0].sum()) == 3 * (sum(map(len, prompts)) + 7 * len(prompts))
    assert (stats.skip_ratio() > 0) == (plan is not None)


# ---------------------------------------------------------------- accelerate: hooks that were there before


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_offloaded_layers_generate_and_come_back(optimized_text: nn.Module, how: str, tmp_path: Path) -> None:
    expected = generated(modes_fx.set_plan(optimized_text, PLAN), tiny.text_batch())
    model = tiny.make("qwen3_moe")
    stock = logits(model, tiny.text_batch())
    if how == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    modes_fx.optimize(model, PLAN)
    assert generated(model, tiny.text_batch()).equal(expected)
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())
    modes_fx.restore(model)
    assert (logits(model, tiny.text_batch()) - stock).abs().max() <= 1e-5
    accelerate.hooks.remove_hook_from_submodules(model)


# ---------------------------------------------------------------- saving and copying


def saved_and_loaded(model: nn.Module, folder: Path) -> nn.Module:
    model.save_pretrained(folder)
    return type(tiny.make()).from_pretrained(folder)


def torch_saved(model: nn.Module, folder: Path) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def deep_copied(model: nn.Module, folder: Path) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module, folder: Path) -> nn.Module:
    loaded: nn.Module = pickle.loads(pickle.dumps(model))
    return loaded


def loaded_weights(model: nn.Module, folder: Path) -> nn.Module:
    twin = type(tiny.make())(model.config)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


WAYS_TO_COPY = [saved_and_loaded, torch_saved, deep_copied, pickled, loaded_weights]


@pytest.mark.parametrize("way", WAYS_TO_COPY)
def test_what_is_saved_or_copied_is_stock_and_can_be_optimised(
    optimized_vlm: nn.Module, way: Callable[[nn.Module, Path], nn.Module], tmp_path: Path
) -> None:
    vlm = modes_fx.set_plan(optimized_vlm, PLAN)
    stock, expected = logits(tiny.make(), INPUTS), logits(vlm, INPUTS)
    twin = way(vlm, tmp_path)
    assert not [name for module in twin.modules() for name, value in vars(module).items() if "modes_fx" in name and value]
    assert {type(module) for module in twin.modules()} == {type(module) for module in tiny.make().modules()}
    assert (logits(twin, INPUTS) - stock).abs().max() <= 1e-5
    assert (logits(modes_fx.optimize(twin, PLAN), INPUTS) - expected).abs().max() <= 1e-5
    assert logits(vlm, INPUTS).equal(expected)


def test_to_whoever_asks_it_is_the_model_that_it_was(vlm: nn.Module, tmp_path: Path) -> None:
    stock = type(vlm)
    signature, names = inspect.signature(vlm.forward), list(vlm.state_dict())
    modes_fx.optimize(vlm, PLAN)
    assert inspect.signature(vlm.forward) == signature
    assert vlm.__class__.__name__ == stock.__name__
    assert isinstance(vlm, stock)
    assert isinstance(vlm.model.language_model, transformers.Qwen3VLMoeTextModel)
    assert list(vlm.state_dict()) == names
    assert str(vlm) == str(tiny.make())
    vlm.save_pretrained(tmp_path)
    saved = transformers.AutoConfig.from_pretrained(tmp_path)
    assert saved.architectures == [stock.__name__]
    assert "modes_fx" not in (tmp_path / "config.json").read_text()
    assert type(transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)) is stock


# ---------------------------------------------------------------- outputs besides the logits

ASKED = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}


@pytest.mark.parametrize(
    ("region", "asked"), [("moe", "all"), ("layer", "all"), ("model", "all"), *(("model", name) for name in ASKED)]
)
def test_outputs_asked_for_on_the_first_call_are_those_of_stock(region: Any, asked: str) -> None:
    wanted = ASKED if asked == "all" else {asked: True}
    models = [tiny.make("qwen3_moe"), tiny.make("qwen3_moe")]
    for each in models:
        each.set_attn_implementation("eager")
    stock, model = models
    modes_fx.optimize(model, region=region)
    with torch.no_grad():
        for settings in (wanted, {}, wanted):
            theirs, mine = (each(**tiny.text_batch(), use_cache=False, **settings) for each in (stock, model))
            assert list(mine) == list(theirs)
            assert (mine.logits - theirs.logits).abs().max() <= 1e-4
            for name in ("hidden_states", "attentions", "router_logits"):
                expected, actual = theirs.get(name), mine.get(name)
                assert (actual is None) == (expected is None), name
                for one, other in zip(expected or (), actual or (), strict=True):
                    assert one.shape == other.shape
                    assert (one - other).abs().max() <= 1e-4 * one.abs().max(), name
    assert [site.status for site in modes_fx.report(model).sites] == ["rewritten"] * 2


@pytest.mark.parametrize("region", ["layer", "model"])
def test_a_plan_holds_for_calls_that_ask_for_outputs_too(region: Any) -> None:
    inputs = tiny.text_batch()
    model = tiny.make("qwen3_moe")
    judge = judged(model, inputs, PLAN)
    modes_fx.optimize(model, PLAN, region=region)
    asked = {"output_hidden_states": True, "output_router_logits": True}
    with torch.no_grad():
        for settings in (asked, {}):
            expected, actual = (each(**inputs, use_cache=False, **settings) for each in (judge.model, model))
            assert relative_error(actual.logits, expected.logits, inputs["input_ids"] >= 0) <= 1e-5
            for one, other in zip(expected.get("hidden_states") or (), actual.get("hidden_states") or (), strict=True):
                assert (one - other).abs().max() <= 1e-4


# ---------------------------------------------------------------- threads


def together(*tasks: Callable[[], None]) -> None:
    """Run tasks in threads of their own; what one raises is raised."""
    errors: list[BaseException] = []

    def run(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("region", ["moe", "model"])
def test_each_forward_in_a_thread_sees_one_of_two_plans_as_a_whole(vlm: nn.Module, region: Any) -> None:
    modes_fx.optimize(vlm, PLAN, region=region)
    answers = []
    for plan in (OTHER, PLAN):
        modes_fx.set_plan(vlm, plan)
        answers.append(logits(vlm, INPUTS))
    assert (answers[0] - answers[1])[REAL].abs().max() > 1e-2
    seen = [0, 0]
    left = threading.Semaphore(0)
    done = threading.Event()

    def forwards() -> None:
        for _ in range(50):
            actual = logits(vlm, INPUTS)
            found = [answer.equal(actual) for answer in answers]
            assert any(found)
            seen[found.index(True)] += 1
            left.release()

    def plans() -> None:
        turn = 0
        while not done.is_set():
            modes_fx.set_plan(vlm, (OTHER, PLAN)[turn % 2])
            turn += 1
            left.acquire(timeout=0.01)

    switching = threading.Thread(target=plans)
    switching.start()
    try:
        together(*[forwards] * 3)
    finally:
        done.set()
        switching.join()
    assert sum(seen) == 150
    assert min(seen) > 0


def test_two_optimised_models_and_a_stock_one_do_not_mix_in_threads() -> None:
    models = [text_model(PLAN), text_model(ALL), tiny.make("qwen3_moe")]
    inputs = [tiny.text_batch(seed=seed) for seed in range(3)]
    expected = [logits(model, batch) for model, batch in zip(models, inputs, strict=True)]
    alone = [modes_fx.stats(model) for model in models[:2]]

    def calls(model: nn.Module, batch: dict[str, Tensor], answer: Tensor) -> None:
        for _ in range(20):
            assert logits(model, batch).equal(answer)

    with alone[0], alone[1]:
        together(*[lambda job=job: calls(*job) for job in zip(models, inputs, expected, strict=True)] * 2)
    assert [int(stats.pairs_routed.sum()) for stats in alone] == [2 * 40 * 18 * 3] * 2
    assert alone[1].skip_ratio() == 1


# ---------------------------------------------------------------- nothing left behind


def test_restored_models_leave_nothing_behind() -> None:
    model, inputs = tiny.make("qwen3_moe"), tiny.text_batch()

    def once() -> list[weakref.ref[Any]]:
        modes_fx.optimize(model, PLAN)
        logits(model, inputs)
        state = vars(model)["_modes_fx"]
        made = [type(model), state, state.runtime, *state.watches, state.regions]
        modes_fx.restore(model)
        return [weakref.ref(item) for item in made]

    def left() -> dict[str, int]:
        gc.collect()
        kinds = Counter(type(item).__name__ for item in gc.get_objects())
        return {kind: kinds[kind] for kind in ("GraphModule", "Graph", "Runtime", "Parameter")}

    once()
    before, names = left(), set(vars(regions))
    refs = once() + once()
    assert {kind: number for kind, number in left().items() if number > before[kind]} == {}
    assert [ref() for ref in refs if ref() is not None] == []
    assert set(vars(regions)) == names  # where dynamo puts the functions that it compiled


@pytest.mark.parametrize("region", ["moe", "model"])
def test_an_optimised_model_that_is_deleted_is_gone(region: Any) -> None:
    model = modes_fx.optimize(tiny.make("qwen3_moe"), PLAN, region=region)
    logits(model, tiny.text_batch())
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    assert [ref() for ref in weights if ref() is not None] == []
