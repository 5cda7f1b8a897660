"""Blocks that mix experts in a way that no conversion keeps, each with its reason; and those that nothing here knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from torch import nn

from modes_fx.models.convert.form import Form
from modes_fx.passes.site import Reject


def _refusing(code: str, detail: str) -> Callable[[nn.Module], NoReturn]:
    def convert(block: nn.Module) -> NoReturn:
        raise Reject(code, f"{type(block).__name__}: {detail}")

    return convert


def _embedded(block: nn.Module) -> str | None:
    """Doge: thousands of experts of one neuron each, rows of two embeddings."""
    tables = [getattr(block, name, None) for name in ("down_embed", "up_embed")]
    return "down_embed" if all(isinstance(table, nn.Embedding) for table in tables) else None


def _with_capacity(block: nn.Module) -> str | None:
    """Switch Transformers and NLLB-MoE."""
    experts, router = getattr(block, "experts", None), getattr(block, "router", None)
    return "experts" if isinstance(experts, nn.ModuleDict) and hasattr(router, "expert_capacity") else None


def _unknown(block: nn.Module) -> str | None:
    for name, child in block.named_children():
        if "expert" not in name or "shared" in name or hasattr(child, "has_gate"):
            continue
        listed = isinstance(child, nn.ModuleList | nn.ModuleDict) and len(child) > 1
        if listed or any(weight.dim() == 3 for weight in child.parameters(recurse=False)):
            return name
    return None


NAMED = (
    Form(_embedded, _refusing("EXPERTS_ARE_EMBEDDINGS", "its experts are rows of embeddings, for which there is no dispatch")),
    Form(_with_capacity, _refusing("CAPACITY", "tokens compete for the places of an expert, in an encoder and a decoder")),
)
UNKNOWN = Form(_unknown, _refusing("UNKNOWN_EXPERTS", "no conversion knows this block of experts"))
