"""Experts' weights packed for the CPU's matrix kernels, in the place of the originals.

Each weight's memory is given up for its blocks, one weight after the other. A ``PackedWeight`` computes as the weight that it
stands for: the kernels read its blocks, any other operation unpacks a copy first, and one that would change it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from modes_fx.errors import ModelError
from modes_fx.kernels import ops

COLUMNS = 32  # of a block; packed.cpp's kColumns
_aten = torch.ops.aten


class PackedWeight(torch.Tensor):
    """A weight bfloat16 [E, N, D] of which only the packed blocks, bfloat16 [E, N / 32, D / 2, 32, 2], are kept.

    Args:
        blocks: See above.
    """

    blocks: Tensor

    @staticmethod
    def __new__(cls, blocks: Tensor) -> PackedWeight:  # noqa: D102 - the class says it
        experts, tiles, halves = blocks.shape[:3]
        shape = (experts, tiles * COLUMNS, halves * 2)
        made: PackedWeight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=blocks.dtype, device=blocks.device)
        made.blocks = blocks
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"PackedWeight(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:  # a copy of the model has the weights as they were
        memo[id(self)] = copied = nn.Parameter(self.unpacked(), requires_grad=False)
        return copied

    def __reduce_ex__(self, _: Any) -> Any:
        return nn.Parameter, (self.unpacked(), False)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["blocks"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: Any, stride: Any) -> PackedWeight:
        return PackedWeight(inner["blocks"])

    def unpacked(self) -> Tensor:
        """Return the weight, contiguous, in memory of its own."""
        return self.blocks.transpose(2, 3).clone(memory_format=torch.contiguous_format).view(self.shape)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (_aten.detach.default, _aten.alias.default):
            return cls(args[0].blocks)
        if func in ops.PACKED:
            return ops.PACKED[func](*(item.blocks if isinstance(item, cls) else item for item in args))
        if func._schema.is_mutable:
            raise ModelError(f"{func} would change weights that are packed. Call modes_fx.restore(model) first.")
        args, kwargs = tree_map_only(cls, cls.unpacked, (args, kwargs or {}))
        return func(*args, **kwargs)


class Packing:
    """Packed weights of a model, and how to put the originals back.

    Raises:
        ModelError: ``pack`` was given no weight that can be packed, or this CPU has no use for it.
    """

    def __init__(self) -> None:
        self._packed: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._made: dict[int, nn.Parameter] = {}  # by the original's id: tied weights stay tied
        self._hooks: dict[nn.Module, Any] = {}

    def pack(self, experts: Sequence[nn.Module]) -> None:
        """Pack the weights of experts modules; each original parameter is left without memory."""
        if not torch.cpu._is_avx512_supported():
            raise ModelError("prepack=True needs a CPU with AVX-512 or AMX. Leave it out: experts are computed all the same.")
        for module in experts:
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in self._made or _packable(module, parameter):
                    self._pack(module, name, parameter)
        if not self._packed:
            raise ModelError(
                "prepack=True found no weight to pack: it takes bfloat16 weights [E, N, D] in main memory, N a multiple of 32 "
                "and D of 2. Leave it out: experts are computed all the same."
            )

    def _pack(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if id(parameter) not in self._made:
            packed = PackedWeight(_blocks_of(parameter.detach()))
            self._made[id(parameter)] = nn.Parameter(packed, requires_grad=False)
        self._packed.append((module, name, parameter))
        module._parameters[name] = self._made[id(parameter)]
        parameter.data = parameter.data.new_empty(0)  # for its memory; and whoever holds it fails, rather than read it
        if module not in self._hooks:
            self._hooks[module] = module.register_state_dict_post_hook(_unpack_entries)

    def undo(self) -> None:
        """Put the original parameters back, but for those that were replaced since: by a cast of the model, say."""
        for hook in self._hooks.values():
            hook.remove()
        for module, name, parameter in self._packed:
            current = module._parameters[name]
            if isinstance(current, PackedWeight):
                if not parameter.numel():
                    parameter.data = current.unpacked()
                module._parameters[name] = parameter
        self._packed.clear()
        self._made.clear()
        self._hooks.clear()


def _blocks_of(weight: Tensor) -> Tensor:
    experts, columns, inner = weight.shape
    blocks = weight.new_empty(experts, columns // COLUMNS, inner // 2, COLUMNS, 2)
    return blocks.copy_(weight.view(experts, columns // COLUMNS, COLUMNS, inner // 2, 2).transpose(2, 3))


def _packable(module: nn.Module, parameter: nn.Parameter) -> bool:
    if parameter.dim() != 3 or getattr(module, "is_transposed", False) or isinstance(parameter, PackedWeight):
        return False
    lies = parameter.is_contiguous() and parameter.device.type == "cpu" and type(parameter) is nn.Parameter
    return lies and parameter.dtype is torch.bfloat16 and parameter.shape[1] % COLUMNS == 0 and parameter.shape[2] % 2 == 0


def _unpack_entries(module: nn.Module, entries: dict[str, Any], prefix: str, _: Any) -> None:
    for name, value in entries.items():
        if name.startswith(prefix) and isinstance(value, PackedWeight):
            entries[name] = value.unpacked()
