"""Where a model's MoE layers are, and which modules around them can be compiled in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from modes_fx.models.convert import Form, convertible
from modes_fx.models.sharding import expert_parallel

Region = Literal["moe", "layer", "model"]
"""``"moe"``: each MoE block. ``"layer"``: each decoder layer. ``"model"``: each stack of decoder layers."""


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer.

    Attributes:
        name: Path of the experts module.
        experts: The module whose ``forward(hidden_TH, ids_TK, weights_TK)`` dispatches.
        block: The module around router and experts, or ``experts`` itself where the model has none.
        layer: The decoder layer.
        stack: The module that holds the list of decoder layers.
        form: How the block can be converted, where its experts do not use transformers' dispatch; None once it is.
        stands_for: The model's own block in whose place ``block`` runs once it is converted, else None.
    """

    name: str
    experts: nn.Module
    block: nn.Module
    layer: nn.Module
    stack: nn.Module
    form: Form | None = None
    stands_for: nn.Module | None = None

    @property
    def place(self) -> nn.Module:
        """The model's own module that is called."""
        return self.block if self.stands_for is None else self.stands_for

    def region(self, region: Region) -> nn.Module:
        """Return the module to compile for a region."""
        return {"moe": self.block, "layer": self.layer, "model": self.stack}[region]

    @property
    def num_experts(self) -> int:
        """E, over all processes; 0 where the block's form is not converted, so that it is unknown."""
        parallel = expert_parallel(self.experts)
        processes = 1 if parallel is None else int(parallel.ep_mesh.size())
        return processes * int(getattr(self.experts, "num_experts", 0)) if self.form is None else 0

    @property
    def hidden_size(self) -> int:
        """Width of the rows that the experts take, H."""
        weight = next(iter(self.experts.parameters()))  # [E, 2I, H], or [E, H, 2I] where transposed
        return weight.shape[-2] if getattr(self.experts, "is_transposed", False) else weight.shape[-1]


def find_moe_layers(model: nn.Module) -> list[MoeLayer]:
    """Return the model's MoE layers, in module order: those that use transformers' dispatch, and those that do not."""
    modules = dict(model.named_modules())
    found = []
    for own_name, own in modules.items():
        form, name, module = None, own_name, own
        # What the decorator of transformers' experts interface leaves on every module that it serves.
        if not all(hasattr(module, mark) for mark in ("has_gate", "is_transposed", "_apply_gate")):
            candidate = convertible(own)
            if candidate is None:
                continue
            form, name = candidate[0], f"{own_name}.{candidate[1]}".lstrip(".")
            module = modules[name]
        parents = [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)]
        listed = next((i for i, parent in enumerate(parents) if _in_list(parent, modules)), None)
        block = parents[0] if parents and listed != 0 else name  # experts right under the decoder layer: no block between
        layer = parents[listed] if listed is not None else block
        stack = parents[listed + 2] if listed is not None and listed + 2 < len(parents) else ""
        found.append(MoeLayer(name, module, modules[block] if form is None else own, modules[layer], modules[stack], form))
    return found


def _in_list(name: str, modules: dict[str, nn.Module]) -> bool:
    return "." in name and isinstance(modules[name.rsplit(".", 1)[0]], nn.ModuleList)


def has_accelerate_hooks(module: nn.Module) -> bool:
    """Return whether accelerate moves weights inside a module when it is called (offloading, several devices)."""
    return any(hasattr(part, "_hf_hook") for part in module.modules())


def has_torchao_weights(module: nn.Module) -> bool:
    """Return whether torchao quantised some of a module's weights."""
    return any(type(parameter).__module__.startswith("torchao") for parameter in module.parameters())


def no_moe_layer(model: nn.Module) -> str:
    """Say why a model has no site that could be looked at."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    experts = {name: getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")}
    named = [f"{name} {number}" for name, number in experts.items() if isinstance(number, int) and number > 1]
    why = f"its config names {named[0]}, but they are dispatched another way" if named else "there is nothing to skip"
    interface = "transformers' experts interface (transformers.integrations.moe)"
    return f"{type(model).__name__} has no MoE layer that uses {interface} or is converted to it: {why}."
