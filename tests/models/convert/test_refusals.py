"""Blocks that cannot be converted: each is reported with its reason, and none is left half converted."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import transformers
from torch import nn

import modes_fx
from modes_fx.errors import NoRoutingSiteError
from modes_fx.models.layers import find_moe_layers
from tests import tiny
from tests.harness import logits
from tests.models.convert import remote
from tests.models.convert.cases import CASES

pytestmark = pytest.mark.usefixtures("without_inductor")


def llama4_of_two() -> nn.Module:
    model = CASES["llama4"].make()
    for block in CASES["llama4"].blocks(model):
        block.top_k = block.router.top_k = 2
    return model


def doge() -> nn.Module:
    config = transformers.DogeConfig(**{**tiny._COMMON, "is_moe": True, "num_experts": 16, "num_experts_per_tok": 3})
    return transformers.DogeForCausalLM(config)


def switch_transformers() -> nn.Module:
    config = transformers.SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_sparse_encoder_layers=1, num_decoder_layers=2,
        num_sparse_decoder_layers=1, num_heads=2, num_experts=4,
    )  # fmt: skip
    return transformers.SwitchTransformersForConditionalGeneration(config)


def nllb_moe() -> nn.Module:
    config = transformers.NllbMoeConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0,
        encoder_attention_heads=2, decoder_attention_heads=2, num_experts=4, encoder_sparse_step=1, decoder_sparse_step=1,
    )  # fmt: skip
    return transformers.NllbMoeForConditionalGeneration(config)


def mixtral(block: type[nn.Module] = remote.MixtralBlock) -> nn.Module:
    model = tiny.FAMILIES["mixtral"]()
    for layer in model.model.layers:
        layer.mlp = remote.WithoutLogits(block(32, 16, 4, 2))
    return model


def changed(change: Callable[[Any], None]) -> nn.Module:
    """Mixtral with something done to its experts."""
    model = mixtral()
    for layer in model.model.layers:
        change(layer.mlp.block)
    return model


def _biased(block: Any) -> None:
    block.experts[1].w1 = nn.Linear(32, 16)


def _narrower(block: Any) -> None:
    block.experts[1] = remote.MixtralMLP(32, 8)


def _sharing(block: Any) -> None:
    block.experts[1].w1.weight = block.experts[0].w1.weight


def _offloaded(block: Any) -> None:
    block.experts[2].to("meta")


def _patched(block: Any) -> None:
    block.forward = functools.partial(type(block).forward, block)  # as accelerate's hooks do


def _parallel(block: Any) -> None:
    block.experts[3] = None


def _ungated(block: Any) -> None:
    for index in range(4):
        block.experts[index] = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32))


class RandomBlock(remote.MixtralBlock):
    """Routes by no Linear that could be understood."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gate = nn.Sequential(self.gate)


REFUSED: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "llama4": ("WEIGHTS_ON_INPUT", llama4_of_two),
    "doge": ("EXPERTS_ARE_EMBEDDINGS", doge),
    "switch_transformers": ("CAPACITY", switch_transformers),
    "nllb_moe": ("CAPACITY", nllb_moe),
    "other_router": ("COMPUTES_OTHERWISE", functools.partial(mixtral, remote.SquaredGateBlock)),
    "unknown": ("UNKNOWN_EXPERTS", functools.partial(mixtral, RandomBlock)),
    "biased": ("EXPERTS_NOT_PLAIN", functools.partial(changed, _biased)),
    "ungated": ("EXPERTS_NOT_PLAIN", functools.partial(changed, _ungated)),
    "narrower": ("EXPERTS_DIFFER", functools.partial(changed, _narrower)),
    "sharing": ("EXPERTS_DIFFER", functools.partial(changed, _sharing)),
    "offloaded": ("WEIGHTS_NOT_LOADED", functools.partial(changed, _offloaded)),
    "patched": ("FORWARD_REPLACED", functools.partial(changed, _patched)),
    "parallel": ("EXPERT_PARALLEL", functools.partial(changed, _parallel)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_named_and_leaves_the_model_alone(name: str) -> None:
    code, build = REFUSED[name]
    model = build().eval()
    parameters = {key: (id(value), value.detach().clone()) for key, value in model.named_parameters()}
    found = len(find_moe_layers(model))
    assert found >= 2
    with pytest.raises(NoRoutingSiteError, match=rf"{found} found, {found} rejected \({found} x {code}\)"):
        modes_fx.optimize(model)
    assert all(module._compiled_call_impl is None for module in model.modules())
    for key, value in model.named_parameters():
        identity, before = parameters[key]
        assert id(value) == identity
        assert value.untyped_storage().nbytes() in (value.nbytes, 0)  # no view into a stack
        assert value.device.type == "meta" or value.equal(before)


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(NoRoutingSiteError, match=r"TRAINING.*model\.eval\(\)"):
        modes_fx.optimize(CASES["deepseek"].make().train())


def test_one_refused_layer_stays_stock_beside_converted_ones() -> None:
    model = mixtral().eval()
    _narrower(model.model.layers[0].mlp.block)
    inputs = tiny.text_batch()
    stock = logits(model, inputs)
    modes_fx.optimize(model)
    report = modes_fx.report(model)
    assert [(site.status, site.code) for site in report.sites] == [("rejected", "EXPERTS_DIFFER"), ("converted", "")]
    assert len(report.rewritten) == len(report.converted) == 1
    assert "2 sites found, 1 rewritten (1 converted)" in str(report)
    assert (logits(model, inputs) - stock).abs().max() <= 1e-5 * stock.abs().max()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_blocks_that_reach_the_dispatch_themselves_are_not_converted(family: str) -> None:
    assert all(layer.form is None for layer in find_moe_layers(tiny.make(family)))


def test_a_dense_model_has_no_block_of_experts() -> None:
    assert find_moe_layers(tiny.dense()) == []
    assert find_moe_layers(nn.ModuleDict({"shared_experts": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})) == []
