"""Stacked experts of torchao's ``Int4OpaqueTensor``, which is one 2-D weight, packed for PyTorch's int4 kernel on CPUs.

torchao 0.18 has no 4-bit tensor for a parameter [E, O, I] on a CPU: ``IntxWeightOnlyConfig`` refuses three dimensions (and
stores 4 bits in 8), ``Int4WeightOnlyConfig`` needs a CUDA library, ``Int4OpaqueTensor`` asserts two dimensions. So experts are
quantised one by one by the latter, and their parts are stacked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.prototype.quantization.int4 import Int4OpaqueTensor
from torchao.utils import TorchAOBaseTensor

from modes_fx.quantise.grouped_mm import grouped_mm_int4
from modes_fx.quantise.int8 import GROUPED_PRODUCTS, rows_weight_offsets

aten = torch.ops.aten


class Int4Experts(TorchAOBaseTensor):  # type: ignore[misc]  # its base is untyped
    """The weights of E experts, [E, O, I], or transposed, [E, I, O].

    The packing suits the processor that it was made on: such a tensor is for use, not for keeping.

    Args:
        qdata: uint8 [E, O, I / 2].
        scale_and_zero: [E, I / group, O, 2], in the dtype that the tensor shows.
        block_size: [1, 1, group], or transposed, [1, group, 1].
        shape: That of the weights.
    """

    tensor_data_names = ["qdata", "scale_and_zero"]  # noqa: RUF012 - torchao's convention
    tensor_attribute_names = ["block_size", "shape"]  # noqa: RUF012

    def __new__(cls, qdata: Tensor, scale_and_zero: Tensor, block_size: list[int], shape: torch.Size) -> Int4Experts:
        """See the class."""
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=scale_and_zero.dtype, device=qdata.device, requires_grad=False
        )

    def __init__(self, qdata: Tensor, scale_and_zero: Tensor, block_size: list[int], shape: torch.Size) -> None:
        super().__init__()
        self.qdata = qdata
        self.scale_and_zero = scale_and_zero
        self.block_size = block_size

    @classmethod
    def from_hp(cls, weight: Tensor, group_size: int) -> Int4Experts:
        """Quantise float weights [E, O, I], expert by expert."""
        experts = [Int4OpaqueTensor.from_hp(matrix.contiguous(), [1, group_size]) for matrix in weight]
        return cls(
            torch.stack([expert.qdata for expert in experts]),
            torch.stack([expert.scale_and_zero for expert in experts]),
            [1, 1, group_size],
            weight.shape,
        )


def _transpose(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    weight, *dims = args
    if {dim % 3 for dim in dims} != {1, 2}:
        raise NotImplementedError("experts in 4 bits can be transposed in their last two dimensions alone")
    number, *block = weight.block_size
    shape = torch.Size((weight.shape[0], weight.shape[2], weight.shape[1]))
    transposed = Int4Experts(weight.qdata, weight.scale_and_zero, [number, *block[::-1]], shape)
    return return_and_correct_aliasing(func, args, kwargs, transposed)


def _select(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    weight, dim, index = args
    if dim != 0 or weight.block_size[1] != 1:
        raise NotImplementedError("of experts in 4 bits, one expert can be selected, before any transposition")
    return Int4OpaqueTensor(weight.qdata[index], weight.scale_and_zero[index], weight.block_size[1:], weight.shape[1:])


def _grouped_mm(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    rows, weight, offsets = rows_weight_offsets(args, kwargs)
    group_size = weight.block_size[1]
    if group_size == 1:
        raise NotImplementedError("experts in 4 bits are grouped along the dimension that is summed over")
    return grouped_mm_int4(rows, weight.qdata, weight.scale_and_zero, group_size, offsets)


Int4Experts.implements(aten.transpose.int)(_transpose)
Int4Experts.implements(aten.select.int)(_select)
Int4Experts.implements(GROUPED_PRODUCTS)(_grouped_mm)
