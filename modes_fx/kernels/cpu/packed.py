"""Experts' weights laid out for the kernels, in the place of the originals, one weight after the other.

Weights [E, N, D] are packed for the CPU's matrix kernels: a weight's memory is given up for its blocks. A ``PackedWeight``
computes as the weight that it stands for: the kernels read its blocks, any other operation unpacks a copy first, and one that
would change it is refused. Weights [E, D, N], as some families store them, are turned: they stay what they are, with other
strides, along D, in which the kernels read.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from modes_fx.errors import ModelError
from modes_fx.kernels.cpu import ops

logger = logging.getLogger(__name__)

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
    """Weights of a model that lie in another way, and how to put the originals back.

    Raises:
        ModelError: ``pack`` was given no weight that it can lay out anew.
    """

    def __init__(self) -> None:
        self._packed: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._made: dict[int, nn.Parameter] = {}  # by the original's id: tied weights stay tied
        self._hooks: dict[nn.Module, Any] = {}
        self._turned: dict[int, nn.Parameter] = {}

    def pack(self, experts: Sequence[nn.Module]) -> None:
        """Pack or turn the weights of experts modules; a packed one's original parameter is left without memory."""
        logger.info("laying out the weights of %d layers' experts for kernels", len(experts))
        for module in experts:
            transposed = getattr(module, "is_transposed", False)
            for name, parameter in list(module.named_parameters(recurse=False)):
                if transposed:
                    self._turn(module, parameter)
                elif id(parameter) in self._made or _packable(parameter):
                    self._pack(module, name, parameter)
        if not self._packed and not self._turned:
            raise ModelError(
                "prepack=True found no weight to pack. It takes weights in main memory: bfloat16 [E, N, D], N a multiple of 32 "
                "and D of 2, on a CPU with AVX-512 or AMX; or [E, D, N], bfloat16 or float32. Leave it out: experts are "
                "computed all the same."
            )

    def _turn(self, module: nn.Module, parameter: nn.Parameter) -> None:
        if _plain(parameter, ops.DTYPES):
            self._turned[id(parameter)] = parameter  # first, so that an interruption leaves nothing behind
            parameter.data = parameter.data.mT.contiguous().mT
        if id(parameter) in self._turned:
            self._hook(module)

    def _pack(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if id(parameter) not in self._made:
            packed = PackedWeight(_blocks_of(parameter.detach()))
            self._made[id(parameter)] = nn.Parameter(packed, requires_grad=False)
        self._packed.append((module, name, parameter))
        module._parameters[name] = self._made[id(parameter)]
        parameter.data = parameter.data.new_empty(0)  # for its memory; and whoever holds it fails, rather than read it
        self._hook(module)

    def _hook(self, module: nn.Module) -> None:
        if module not in self._hooks:
            self._hooks[module] = module.register_state_dict_post_hook(_as_they_were)

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
        for parameter in self._turned.values():
            parameter.data = parameter.data.contiguous()
        self._packed.clear()
        self._turned.clear()
        self._made.clear()
        self._hooks.clear()


def _blocks_of(weight: Tensor) -> Tensor:
    experts, columns, inner = weight.shape
    blocks = weight.new_empty(experts, columns // COLUMNS, inner // 2, COLUMNS, 2)
    return blocks.copy_(weight.view(experts, columns // COLUMNS, COLUMNS, inner // 2, 2).transpose(2, 3))


def _packable(parameter: nn.Parameter) -> bool:
    plain = torch.cpu._is_avx512_supported() and _plain(parameter, {torch.bfloat16})
    return plain and parameter.shape[1] % COLUMNS == 0 and parameter.shape[2] % 2 == 0


def _plain(parameter: nn.Parameter, dtypes: Collection[torch.dtype]) -> bool:
    is_weight = parameter.dim() == 3 and parameter.dtype in dtypes and type(parameter) is nn.Parameter
    return is_weight and parameter.is_contiguous() and parameter.device.type == "cpu"


def _as_they_were(module: nn.Module, entries: dict[str, Any], prefix: str, _: Any) -> None:
    for name, value in entries.items():
        if name.startswith(prefix) and isinstance(value, Tensor):
            entries[name] = value.unpacked() if isinstance(value, PackedWeight) else value.contiguous()
