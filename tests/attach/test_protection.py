"""MC-MoE's protected tokens: which they are, and that they keep all their experts in prefill."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import modes_fx
from modes_fx.attach.protection import attention_received, protected
from modes_fx.errors import ModelError, PlanError
from modes_fx.graph.stock import Marking
from modes_fx.optimize import optimized_state
from modes_fx.plan import PlanPoint, SkipPlan
from tests import harness, oracle, tiny

pytestmark = pytest.mark.usefixtures("without_inductor")

INPUTS = tiny.mixed_batch(seed=3)


def plan(beta: float) -> SkipPlan:
    return SkipPlan((PlanPoint(None, beta, beta),), rule="mc_moe")


@pytest.mark.parametrize("masked", ["bool", "additive"])
def test_attention_received_is_the_mean_over_later_tokens_and_heads(masked: str) -> None:
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    mask = torch.ones(6, 6, dtype=torch.bool).tril() & real[:, None, None, :]
    mask = mask if masked == "bool" else torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    found = attention_received(q, k, mask, 0.3, real)
    torch.testing.assert_close(found, oracle.received(q, k.repeat_interleave(2, dim=1), real, 0.3))
    assert found[:, -1].tolist() == [0.0, 0.0]
    causal = attention_received(q, k, None, 0.3, real)[1]
    torch.testing.assert_close(causal, found[1])


def test_two_per_cent_of_each_sequence_are_protected_and_one_at_least() -> None:
    importance = torch.rand(2, 130)
    real = torch.ones(2, 130, dtype=torch.bool)
    real[1, :100] = False
    mine = protected(importance, real)
    assert mine.sum(1).tolist() == [3, 1]
    assert importance[0][mine[0]].min() > importance[0][~mine[0]].max()
    assert int(mine[1].nonzero()) == 100 + int(importance[1, 100:].argmax())
    assert protected(torch.zeros(1, 5), torch.ones(1, 5, dtype=torch.bool)).tolist() == [[True] + [False] * 4]


class ProtectingOracle(oracle.Oracle):
    """Eager attention and eager experts; each layer's own attention and hidden states say which tokens it protects."""

    def protect(self, classes: Tensor) -> "ProtectingOracle":
        self.model.set_attn_implementation("eager")
        self._classes, self._hidden, self._mine = classes, torch.empty(0), torch.empty(0)
        for layer in self.model.model.language_model.layers:
            layer.register_forward_pre_hook(self._enter, with_kwargs=True)
            layer.self_attn.register_forward_hook(self._attended)
        self.keep = self._keep
        return self

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hidden = (args or (kwargs["hidden_states"],))[0]

    def _attended(self, module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        real = self._classes != 2
        self._mine = torch.zeros_like(real)
        for row in range(len(real)):
            here = real[row].nonzero().flatten().tolist()
            scores = oracle.token_importance(self._hidden[row], output[1][row], here)
            for token in sorted(here, key=lambda token: -scores[token])[: math.ceil(0.02 * len(here))]:
                self._mine[row, token] = True

    def _keep(self, weights: Tensor, bound: Tensor) -> Tensor:
        finite = bound.clamp(max=1e9)
        by_share = ~oracle.decide("naee", weights, torch.zeros_like(weights, dtype=torch.int64), finite).isnan()
        real = (self._classes != 2).flatten()[:, None]
        return (by_share | self._mine.flatten()[:, None]) & real


@pytest.fixture(scope="module")
def wanted() -> Callable[[float], tuple[Tensor, Tensor]]:
    """What each bound keeps, and the logits, told once for all regions."""

    @cache
    def tell(beta: float) -> tuple[Tensor, Tensor]:
        judge = ProtectingOracle(tiny.make(), torch.full((2, 2), beta), torch.float32).protect(tiny.classes(INPUTS))
        expected = judge(tiny.classes(INPUTS), **INPUTS, use_cache=False).logits
        return judge.kept[..., 0], expected

    return tell


@pytest.mark.parametrize(
    ("region", "betas"), [("moe", (0.0, 0.45, 1e9)), ("layer", (0.45, 1e9, 0.0)), ("model", (1e9, 0.0, 0.45))]
)
def test_protected_tokens_keep_all_and_others_what_naee_keeps(
    vlm: nn.Module, wanted: Callable[[float], tuple[Tensor, Tensor]], region: Any, betas: tuple[float, ...]
) -> None:
    """The first bound, each is one, makes the graphs; no other one does."""
    modes_fx.optimize(vlm, plan(betas[0]), region=region)
    graphs = None
    for beta in betas:
        kept, expected = wanted(beta)
        modes_fx.set_plan(vlm, plan(beta))
        with modes_fx.stats(vlm).reset() as stats:
            actual = harness.logits(vlm, INPUTS)
        assert stats.pairs_kept[..., 0].equal(kept)
        assert harness.relative_error(actual, expected, tiny.classes(INPUTS) != 2) < 1e-4
        if beta > 1:
            assert int(stats.pairs_kept.sum()) == 2 * 3 * 3  # layers x sequences x K: one token of each
        graphs = graphs or modes_fx.report(vlm).graphs
        assert modes_fx.report(vlm).graphs == graphs


def test_decode_steps_protect_nothing(vlm: nn.Module) -> None:
    modes_fx.optimize(vlm, plan(1e9))
    with modes_fx.stats(vlm) as stats:
        vlm.generate(**INPUTS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert stats.skip_ratio(phase="decode") == 1.0
    assert 0 < stats.skip_ratio(phase="prefill") < 1


def test_restore_gives_the_attention_back(vlm: nn.Module) -> None:
    before, state = vlm.config.text_config._attn_implementation, harness.model_state(vlm)
    modes_fx.optimize(vlm, plan(0.4))
    assert vlm.config.text_config._attn_implementation != before
    modes_fx.restore(vlm)
    assert vlm.config.text_config._attn_implementation == before
    assert harness.model_state(vlm) == state


def test_attention_that_cannot_be_observed_is_refused(vlm: nn.Module) -> None:
    vlm.set_attn_implementation("eager")
    with pytest.raises(ModelError, match=r"runs as \['eager'\].*sdpa"):
        modes_fx.optimize(vlm, plan(0.4))
    assert vlm.config.text_config._attn_implementation == "eager"


def test_a_prefill_whose_attention_was_not_seen_is_an_error(vlm: nn.Module) -> None:
    modes_fx.optimize(vlm, plan(0.4))
    vlm.config.text_config._attn_implementation = "sdpa"
    with pytest.raises(ModelError, match="before any attention"):
        harness.logits(vlm, INPUTS)
    modes_fx.set_plan(vlm, None)
    harness.logits(vlm, INPUTS)
    assert optimized_state(vlm).runtime.in_force.keeps_all


def test_the_bare_backend_cannot_protect() -> None:
    with pytest.raises(PlanError, match="'mc_moe' observes attention"):
        Marking(torch.fx.symbolic_trace(nn.Identity()), plan(0.4))
