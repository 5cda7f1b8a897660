"""Models with quantised experts: rewritten, unchanged at 0, the oracle's logits above it, as they were after restore."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode

import modes_fx
from modes_fx.errors import ModelError, NoRoutingSiteError
from modes_fx.models.layers import find_moe_layers
from modes_fx.plan import SkipPlan
from modes_fx.quantise import quantise_experts
from modes_fx.quantise.memory import weight_bytes
from tests import harness, tiny
from tests.harness import logits, plan_of, relative_error
from tests.oracle import Oracle, random_bounds

pytest.importorskip("torchao", reason="quantised experts need torchao")
from torchao.quantization import (
    Float8WeightOnlyConfig,
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    PerGroup,
    quantize_,
)

from tests.quantise.models import opened, plain, quantised, stock_loop, weights_of

MATTERS = 0.005
"""Relative difference of logits that quantisation makes at least."""

EXPERTS = r"re:.*\.experts\.(gate_up_proj|down_proj)"


def opened_by_aot(module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """A ``compile_graph`` that goes as far as AOT, which opens tensor subclasses; compiling kernels takes seconds."""
    return aot_eager(module, list(inputs))


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "with_inductor" not in request.fixturenames:
        harness.compile_with(monkeypatch, opened_by_aot)


@pytest.fixture
def with_inductor() -> None:
    """Let Inductor compile after all."""


def batch_for(family: str) -> dict[str, torch.Tensor]:
    return tiny.mixed_batch(seed=2) if family == "qwen3_vl_moe" else tiny.text_batch(seed=2)


def assert_optimised(
    model: nn.Module, meant: torch.Tensor, unquantised: nn.Module, inputs: dict[str, torch.Tensor], slack: float = 1e-5
) -> None:
    """Optimise a quantised model: it is rewritten, gives the logits that its weights stand for, and skips when told to."""
    modes_fx.optimize(model)
    assert [site.status for site in modes_fx.report(model).sites] == ["rewritten"] * 2
    real, ours = tiny.classes(inputs) != 2, logits(model, inputs)
    assert relative_error(ours, meant, real) <= slack
    assert relative_error(ours, logits(unquantised, inputs), real) > MATTERS
    modes_fx.set_plan(model, SkipPlan.uniform(text=float("inf"), vision=float("inf")))
    with modes_fx.stats(model) as stats:
        assert relative_error(logits(model, inputs), ours, real) > 1e-3
    assert stats.skip_ratio() == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "glm4v_moe", "deepseek_v3"])
def test_at_thresholds_of_0_it_is_the_quantised_stock_model_and_restore_gives_that_back(
    family: str, dtype: torch.dtype, bits: int
) -> None:
    model, inputs = quantised(bits, family, dtype), batch_for(family)
    real = tiny.classes(inputs) != 2
    loop, stock, before = logits(stock_loop(model), inputs), logits(model, inputs), harness.model_state(model)
    modes_fx.optimize(model)
    found = modes_fx.report(model)
    assert {site.status for site in found.sites} == {"rewritten"}
    ours = logits(model, inputs)
    slack = 1e-5 if dtype is torch.float32 else 0.05
    assert relative_error(ours, loop, real) <= slack
    assert relative_error(ours, stock, real) <= slack
    assert relative_error(stock, logits(plain(family, dtype), inputs), real) > MATTERS
    modes_fx.restore(model)
    assert harness.model_state(model) == before
    assert logits(model, inputs).equal(stock)


@pytest.mark.parametrize("dispatch", ["compact", "static"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "deepseek_v3"])
def test_above_0_it_is_the_oracle_on_the_weights_that_the_bits_stand_for(family: str, bits: int, dispatch: str) -> None:
    model, inputs = quantised(bits, family), batch_for(family)
    classes, meant = tiny.classes(inputs), opened(model, plain(family))
    bounds = random_bounds(meant, classes, seed=bits, **inputs)
    oracle = Oracle(meant, bounds)
    wanted = oracle(classes, **inputs).logits
    stock = logits(model, inputs)
    modes_fx.optimize(model, plan_of(bounds), dispatch=dispatch)
    with modes_fx.stats(model) as stats:
        actual = logits(model, inputs)
    assert relative_error(actual, wanted, classes != 2) <= 5e-5
    assert relative_error(actual, stock, classes != 2) > 1e-3
    assert stats.pairs_kept.equal(oracle.kept)
    modes_fx.set_plan(model, SkipPlan.uniform(text=float("inf"), vision=float("inf")))
    nothing = Oracle(meant, torch.full_like(bounds, float("inf")))(classes, **inputs).logits
    assert relative_error(logits(model, inputs), nothing, classes != 2) <= 5e-5


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "region"), [(8, "layer"), (4, "model")])
def test_larger_regions(bits: int, region: str) -> None:
    model, inputs = quantised(bits), tiny.mixed_batch()
    stock = logits(model, inputs)
    modes_fx.optimize(model, region=region)
    assert len(modes_fx.report(model).rewritten) == 2
    assert relative_error(logits(model, inputs), stock, tiny.classes(inputs) != 2) <= 1e-5


@pytest.mark.usefixtures("with_inductor")
def test_inductor_compiles_it() -> None:
    model, inputs = quantised(8), tiny.mixed_batch()
    stock = logits(model, inputs)
    modes_fx.optimize(model)
    assert relative_error(logits(model, inputs), stock, tiny.classes(inputs) != 2) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_generation_skips(bits: int) -> None:
    model, inputs = quantised(bits), tiny.mixed_batch()
    stock = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    modes_fx.optimize(model)
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).equal(stock)
    modes_fx.set_plan(model, SkipPlan.uniform(text=0.3, vision=0.3))
    with modes_fx.stats(model) as stats:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert 0 < stats.skip_ratio(phase="decode") < 1
    assert modes_fx.report(model).graphs <= 2


def test_memory_is_that_of_the_bits_and_their_scales() -> None:
    def size(model: nn.Module) -> int:
        return weight_bytes(layer.experts for layer in find_moe_layers(model))

    values = sum(weight.numel() for weight in weights_of(plain()).values())
    rows = groups = values // 32  # a row of 32 is a group
    assert size(quantised(8, dtype=torch.bfloat16)) == values + rows * (4 + 1)  # a float32 scale and an int8 zero a row
    assert size(quantised(4, dtype=torch.bfloat16)) == values // 2 + groups * 2 * 2  # a bfloat16 scale and zero a group
    assert size(plain(dtype=torch.bfloat16)) == 2 * values


def test_nothing_but_experts_is_quantised() -> None:
    model = quantised(4)
    changed = {name for name, parameter in model.named_parameters() if type(parameter) is not nn.Parameter}
    assert changed == set(weights_of(model))


@pytest.mark.parametrize("granularity", [None, PerGroup(16)])
def test_a_model_that_torchao_quantised(granularity: Any) -> None:
    config = Int8WeightOnlyConfig(set_inductor_config=False, **({"granularity": granularity} if granularity else {}))
    model, inputs = plain(), tiny.mixed_batch()
    quantize_(model, FqnToConfig({EXPERTS: config}), filter_fn=None)
    assert_optimised(model, logits(opened(model, plain()), inputs), plain(), inputs)


def test_a_checkpoint_that_transformers_quantises_while_loading(tmp_path: Path) -> None:
    stored, inputs = plain(), tiny.mixed_batch()
    stored.save_pretrained(tmp_path)
    config = transformers.TorchAoConfig(FqnToConfig({EXPERTS: Int8WeightOnlyConfig(set_inductor_config=False)}))
    model = type(stored).from_pretrained(tmp_path, dtype=torch.float32, quantization_config=config).eval()
    assert_optimised(model, logits(quantised(8), inputs), plain(), inputs)


def test_transposed_experts_with_biases_in_8_bits() -> None:
    model, inputs = quantised(8, "gpt_oss"), tiny.text_batch()
    assert_optimised(model, logits(opened(model, plain("gpt_oss")), inputs), plain("gpt_oss"), inputs)


def test_float8_in_bfloat16_needs_nothing_from_us() -> None:
    model, inputs = plain(dtype=torch.bfloat16), tiny.mixed_batch()
    quantize_(model, FqnToConfig({EXPERTS: Float8WeightOnlyConfig(set_inductor_config=False)}), filter_fn=None)
    assert_optimised(model, logits(model, inputs), plain(dtype=torch.bfloat16), inputs, slack=0.05)


def test_weights_whose_activations_would_be_quantised_too_are_refused() -> None:
    model = plain()
    config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    quantize_(model, FqnToConfig({EXPERTS: config}), filter_fn=None)
    before = harness.model_state(model)
    with pytest.raises(NoRoutingSiteError, match=r"2 x QUANTISED_ACTIVATIONS.*use Int8WeightOnlyConfig"):
        modes_fx.optimize(model)
    assert harness.model_state(model) == before
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(ModelError, match="use Int8WeightOnlyConfig"):
        logits(model, tiny.mixed_batch())


def test_quantised_experts_are_refused_off_the_cpu() -> None:
    model = quantise_experts(plain(), 8)
    with FakeTensorMode(allow_non_fake_inputs=True):  # as they would lie on a GPU
        for layer in find_moe_layers(model):
            for name, weight in list(layer.experts.named_parameters(recurse=False)):
                parts = [torch.empty_like(part, device="cuda") for part in (weight.qdata, weight.scale)]
                moved = Int8Tensor(*parts, list(weight.block_size), weight.dtype)
                setattr(layer.experts, name, nn.Parameter(moved, requires_grad=False))
    with pytest.raises(NoRoutingSiteError, match=r"2 x QUANTISED_DEVICE.*these are on cuda: move"):
        modes_fx.optimize(model)


def test_quantising_an_optimised_model_is_refused() -> None:
    model, inputs = modes_fx.optimize(plain()), tiny.mixed_batch()
    before = logits(model, inputs)
    with pytest.raises(ModelError, match=r"optimised\. Quantise it first"):
        quantise_experts(model, 8)
    assert logits(model, inputs).equal(before)


@pytest.mark.parametrize("knows_the_product", [True, False])
def test_torchao_on_an_optimised_model_takes_effect_or_the_next_call_says_so(
    knows_the_product: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = modes_fx.optimize(plain()), tiny.mixed_batch()
    logits(model, inputs)
    wanted = logits(quantised(8), inputs)
    quantize_(model, FqnToConfig({EXPERTS: Int8WeightOnlyConfig(set_inductor_config=False)}), filter_fn=None)
    if knows_the_product:
        assert relative_error(logits(model, inputs), wanted, tiny.classes(inputs) != 2) <= 1e-5
    else:
        monkeypatch.delitem(Int8Tensor._ATEN_OP_TABLE[Int8Tensor], torch.ops.aten.transpose.int)  # as torchao has it
        with pytest.raises(ModelError, match=r"quantised or given .* call modes_fx\.optimize\(\) again"):
            logits(model, inputs)
