"""A tiny model of each form that is converted, and where an oracle can reach its routing weights."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests import tiny
from tests.models.convert import remote

Edit = Callable[[Tensor, Tensor], Tensor]
"""``edit(ids_TK, weights_TK)`` returns the weights to use."""


@dataclass(frozen=True)
class Case:
    """One form.

    Attributes:
        build: Makes the model.
        tap: Lets an ``Edit`` change what a stock block's router hands to its experts.
        experts: What a layer's path in the report ends with.
        gemms: Grouped GEMMs of a layer.
        vision: Whether the model takes images.
    """

    build: Callable[[], nn.Module]
    tap: Callable[[Any, Edit], None]
    experts: str = "mlp.experts"
    gemms: int = 2
    vision: bool = False

    def make(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return copy.deepcopy(_prototype(self)).to(dtype)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        path = self.experts.rsplit(".", 1)
        return [module for name, module in model.named_modules() if name.endswith(path[0]) and hasattr(module, path[1])]

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        return tiny.mixed_batch(seed=seed) if self.vision else tiny.text_batch(seed=seed)


@cache
def _prototype(case: Case) -> nn.Module:
    torch.manual_seed(3)
    model = case.build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            routes = any(part in name for part in ("gate.weight", "router", "classifier"))
            if parameter.dim() >= 2:
                parameter.normal_(std=1.0 if routes else 0.3)
            elif "bias" in name:
                parameter.normal_(std=0.1)
    return model


def _swapped(model: nn.Module, block: Callable[[], nn.Module]) -> nn.Module:
    """Put another block in the place of each MoE block."""
    for module in list(model.modules()):
        if hasattr(getattr(module, "mlp", None), "experts"):
            module.mlp = block()
    return model


def _deepseek(block: type[remote.DeepseekBlock]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = tiny.FAMILIES["deepseek_v3"]()
        return _swapped(model, lambda: block(model.config))

    return build


def _old(family: str, block: Callable[..., nn.Module], top_k: int = 3) -> Callable[[], nn.Module]:
    return lambda: _swapped(tiny.FAMILIES[family](), lambda: remote.WithoutLogits(block(32, 16, 6, top_k)))


def dbrx() -> nn.Module:
    ffn = {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 6, "moe_top_k": 3, "ffn_act_fn": {"name": "silu"}}
    config = transformers.DbrxConfig(
        d_model=32, n_heads=2, n_layers=2, max_seq_len=128, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        attn_config={"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 1e4}, ffn_config=ffn,
    )  # fmt: skip
    return transformers.DbrxForCausalLM(config)


def longcat_flash() -> nn.Module:
    config = transformers.LongcatFlashConfig(**{
        **tiny._COMMON, "num_hidden_layers": 4, "ffn_hidden_size": 32, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "head_dim": 8, "v_head_dim": 16, "moe_topk": 4, "n_routed_experts": 6,
        "zero_expert_num": 2, "expert_ffn_hidden_size": 16, "routed_scaling_factor": 1.5,
    })  # fmt: skip
    return transformers.LongcatFlashForCausalLM(config)


def step3p7() -> nn.Module:
    from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig

    text = Step3p7TextConfig(**{
        **tiny._COMMON, "moe_intermediate_size": 16, "share_expert_dim": 16, "num_local_experts": 6, "num_experts_per_tok": 3,
        "head_dim": 16, "mlp_layer_types": ["sparse"] * 2, "swiglu_limits": [0.0, 0.5], "moe_router_scaling_factor": 1.5,
        "layer_types": ["full_attention"] * 2, "sliding_window": 64,
    })  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 4}  # fmt: skip
    return transformers.Step3p7ForConditionalGeneration(transformers.Step3p7Config(text_config=text, vision_config=vision))


def llama4() -> nn.Module:
    changes = {"intermediate_size_mlp": 32, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 1,
               "moe_layers": [0, 1]}  # fmt: skip
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**{**tiny._COMMON, **changes}))


def jetmoe() -> nn.Module:
    changes = {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    return transformers.JetMoeForCausalLM(transformers.JetMoeConfig(**{**tiny._COMMON, **changes}))


def tap_experts(block: Any, edit: Edit) -> None:
    """Of experts that are called with (hidden, ids, weights)."""
    block.experts.register_forward_pre_hook(lambda module, args: (args[0], args[1], edit(args[1], args[2])))


def tap_infer(block: Any, edit: Edit) -> None:
    """Of a method ``moe_infer``, whose ids and weights may be flat."""

    def infer(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        edited = edit(ids.reshape(len(x), -1), weights.reshape(len(x), -1))
        return type(block).moe_infer(block, x, ids, edited.reshape(weights.shape))

    block.moe_infer = infer


def tap_route(block: Any, edit: Edit) -> None:
    """Of blocks in ``remote`` that route in a method."""
    stock = block.route

    def route(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, ids = stock(hidden)
        return logits, edit(ids, weights), ids

    block.route = route


def tap_jetmoe(block: Any, edit: Edit) -> None:
    """Of a router that returns pairs in expert order."""

    def hook(module: Any, args: Any, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        order, token, gates, sizes, logits = outputs
        pairs = torch.empty_like(gates)
        pairs[order] = gates
        weights = pairs.view(-1, module.top_k)
        return order, token, edit(torch.zeros_like(weights).long(), weights).reshape(-1)[order], sizes, logits

    block.router.register_forward_hook(hook)


def tap_llama4(block: Any, edit: Edit) -> None:
    """Of a router that returns a score for every expert."""

    def hook(module: Any, args: Any, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        scores, logits = outputs
        weights, ids = scores.topk(module.top_k)
        return torch.zeros_like(scores).scatter(1, ids, edit(ids, weights)), logits

    block.router.register_forward_hook(hook)


CASES = {
    "deepseek": Case(_deepseek(remote.DeepseekBlock), tap_infer),
    "deepseek_flat": Case(_deepseek(remote.FlatDeepseekBlock), tap_infer),
    "mixtral": Case(_old("mixtral", remote.MixtralBlock, 2), tap_route, "block.experts"),
    "qwen2": Case(_old("qwen2_moe", remote.Qwen2Block), tap_route, "block.experts"),
    "qwen3_vl": Case(_old("qwen3_vl_moe", remote.Qwen3Block), tap_route, "block.experts", vision=True),
    "dbrx": Case(dbrx, tap_experts, "ffn.experts", gemms=3),
    "longcat_flash": Case(longcat_flash, tap_experts),
    "step3p7": Case(step3p7, tap_experts),
    "llama4": Case(llama4, tap_llama4, "feed_forward.experts"),
    "jetmoe": Case(jetmoe, tap_jetmoe, "mlp.input_linear"),
}
STACKED = ("deepseek", "deepseek_flat", "mixtral", "qwen2", "qwen3_vl")
"""Forms whose weights are stacked; the others compute with the block's own."""


class Oracle:
    """A stock model in float64 whose dropped pairs weigh 0, and what it counted.

    Args:
        case: The form.
        bounds: [L, 2], for (text, vision); None keeps all.
    """

    def __init__(self, case: Case, bounds: Tensor | None) -> None:
        self.model = case.make(torch.float64)
        self.bounds = bounds
        blocks = case.blocks(self.model)
        self.kept = [0] * len(blocks)
        self.weights: list[Tensor] = [torch.empty(0)] * len(blocks)
        for layer, block in enumerate(blocks):
            case.tap(block, self._edit(layer, getattr(getattr(block, "experts", None), "num_routed_experts", None)))

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        self.classes = tiny.classes(inputs).reshape(-1)
        given = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
        with torch.no_grad():
            return self.model(**given, use_cache=False).logits

    def _edit(self, layer: int, experts: int | None) -> Edit:
        def edit(ids: Tensor, weights: Tensor) -> Tensor:
            routed = ids < experts if experts is not None else torch.ones_like(ids, dtype=torch.bool)
            self.weights[layer] = weights[routed].float()
            bounds = torch.tensor([*([0.0, 0.0] if self.bounds is None else self.bounds[layer]), float("inf")])
            keep = weights >= bounds[self.classes].unsqueeze(1)
            self.kept[layer] = int((keep & routed).sum())
            return torch.where(keep | ~routed, weights, torch.zeros_like(weights))

        return edit


def random_bounds(case: Case, inputs: dict[str, Tensor], seed: int) -> Tensor:
    """Return [L, 2] bounds somewhere in the middle of the weights that the model dispatches."""
    oracle = Oracle(case, None)
    oracle(inputs)
    generator = torch.Generator().manual_seed(seed)
    levels = [torch.rand(2, generator=generator) * 0.5 + 0.3 for _ in oracle.weights]
    return torch.stack([torch.quantile(weights, level) for weights, level in zip(oracle.weights, levels, strict=True)])
