"""Which processes a model's experts lie in, as transformers has sharded it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from modes_fx.errors import ModelError
from modes_fx.graph.experts import is_expert_parallel

if TYPE_CHECKING:
    from transformers.distributed.expert_parallel import EPImplementation


def expert_parallel(experts: nn.Module) -> EPImplementation | None:
    """Return what brings tokens to experts of which each process holds some; None where this process holds them all.

    transformers puts a function in the place of such a module's ``forward``, which calls it.
    """
    forward = vars(experts).get("forward")
    if not is_expert_parallel(experts):
        return None
    if inspect.isfunction(forward):
        return inspect.getclosurevars(forward).nonlocals.get("implementation")
    return getattr(getattr(forward, "__self__", None), "implementation", None)  # attach.expert_parallel stands in its place


def sends(implementation: Any) -> bool:
    """Return whether tokens travel to the experts in every call, so that sizes are read from the host."""
    return getattr(implementation, "all_reduce", None) is None and type(implementation).__name__ != "AllReduceEP"


@contextlib.contextmanager
def whole_weights(experts: nn.Module, *around: nn.Module) -> Iterator[None]:
    """Let experts have the weights that they compute with, for the length of a block.

    Args:
        experts: The module.
        around: Modules around it, by which ``fully_shard`` may gather its weights.
    """
    gathers: list[Any] = [module for module in dict.fromkeys((*around, experts)) if hasattr(module, "unshard")]
    for module in gathers:
        module.unshard()
    sharded: dict[str, Any] = {}
    if expert_parallel(experts) is not None:  # whose own part transformers puts there when it calls them
        sharded = {name: weight for name, weight in experts._parameters.items() if hasattr(weight, "to_local")}
    for name, weight in sharded.items():
        experts._parameters[name] = nn.Parameter(weight.to_local(), requires_grad=False)
    try:
        yield
    finally:
        experts._parameters.update(sharded)
        for module in gathers:
            module.reshard()


def has_sharded_heads(layer: nn.Module, block: nn.Module) -> bool:
    """Return whether each process sees some of a decoder layer's attention heads.

    Args:
        layer: The decoder layer.
        block: Its MoE block, which is not looked at.
    """
    inside = {id(part) for part in block.modules()}
    return any(getattr(part, "_is_hooked", False) for part in layer.modules() if id(part) not in inside)


def processes_of(model: nn.Module) -> int:
    """Return over how many processes a model's weights are sharded; 1 where each has them all."""
    meshes = [weight.device_mesh for weight in model.parameters() if hasattr(weight, "device_mesh")]
    return max((int(mesh.size()) for mesh in meshes), default=1)


def check_sharding(model: nn.Module) -> None:
    """Refuse what holds a model's layers, or their weights, where they cannot be taken.

    Raises:
        ModelError: Pipeline parallelism, or FSDP of the first kind.
    """
    name = type(model).__name__
    if hasattr(model, "_pp_stage") or hasattr(model, "pippy_stage"):
        raise ModelError(
            f"This process runs one stage of a pipeline, some layers of {name}, and a plan's thresholds are for all of them. "
            'Shard it with DistributedConfig(tp_size=..., ep_size=... or fsdp_size=...), or load it with device_map="auto".'
        )
    if any(hasattr(part, "_fsdp_wrapped_module") or hasattr(part, "_flat_param") for part in model.modules()):
        raise ModelError(
            "FullyShardedDataParallel has flattened the model's weights. Shard it with torch.distributed.fsdp.fully_shard "
            "(accelerate: fsdp_version=2), before or after modes_fx.optimize()."
        )
