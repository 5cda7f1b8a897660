"""Grouped products for torchao's ``Int8Tensor``: [E, O, I] with a scale a row, a group of a row, or one in all.

torchao 0.18 quantises such parameters (``FqnToConfig``), selects an expert, and multiplies by it as a linear layer; so
transformers' loop over experts runs. Its ``grouped_mm`` does not: ``transpose`` and the product are not implemented. They are
added here, through torchao's own means of adding operators, where the installed release lacks them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401 - registers the float32 product
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.quantization import Int8Tensor

from modes_fx.errors import ModelError
from modes_fx.quantise.grouped_mm import grouped_mm_int8

aten = torch.ops.aten

GROUPED_PRODUCTS = [aten._grouped_mm.default, torch.ops.transformers.grouped_mm_fallback.default]
"""What transformers' ``grouped_mm`` calls: the first in bfloat16, and outside a trace in any dtype; the second in float32."""


def rows_weight_offsets(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any, Tensor]:
    """Return the arguments of a grouped product."""
    return args[0], args[1], args[2] if len(args) > 2 else kwargs["offs"]


def _transpose(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    weight, *dims = args
    block_size = list(weight.block_size)
    block_size[dims[0]], block_size[dims[1]] = block_size[dims[1]], block_size[dims[0]]
    transposed = Int8Tensor(
        weight.qdata.transpose(*dims),
        weight.scale.transpose(*dims),
        block_size,
        weight.dtype,
        zero_point=None if weight.zero_point is None else weight.zero_point.transpose(*dims),
        act_pre_scale=weight.act_pre_scale,
        act_quant_kwargs=weight.act_quant_kwargs,
        reduce_range=weight.reduce_range,
    )
    return return_and_correct_aliasing(func, args, kwargs, transposed)


def _grouped_mm(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    rows, weight, offsets = rows_weight_offsets(args, kwargs)
    if (reason := refusal(weight)) is not None:
        raise ModelError(f"These experts' weights cannot be multiplied by: {reason}.")
    return grouped_mm_int8(rows, weight.qdata, weight.scale, weight.zero_point, offsets)


def in_few_bits(weight: Any) -> bool:
    """Return whether a weight is stored in 8 or 4 bits, for the product by expert that is added here."""
    return isinstance(weight, Int8Tensor) or type(weight).__module__ == "modes_fx.quantise.int4"  # which torchao may lack


def refusal(weight: Any) -> str | None:
    """Say why a weight is more than weights in 8 bits; None where it is not."""
    if isinstance(weight, Int8Tensor) and (weight.act_quant_kwargs is not None or weight.act_pre_scale is not None):
        return "torchao would quantise or scale activations too, which has no grouped product here: use Int8WeightOnlyConfig"
    return None


def _add(operators: list[Any], implementation: Callable[..., Any]) -> None:
    known = Int8Tensor._ATEN_OP_TABLE.get(Int8Tensor, {})
    Int8Tensor.implements([operator for operator in operators if operator not in known])(implementation)


_add([aten.transpose.int], _transpose)
_add(GROUPED_PRODUCTS, _grouped_mm)
