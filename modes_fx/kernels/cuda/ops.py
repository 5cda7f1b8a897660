"""Experts over kept pairs on an NVIDIA GPU as torch operations, which Inductor and CUDA graphs see through.

Shapes: T tokens, K experts a token, S = T * K pairs (a *pair* is token * K + rank), E experts, D inner and N outer size. All
are fixed, whatever is kept: rows of dropped pairs are left as the allocator gives them, and no operation here reads them.
``experts`` is int32 [S], a pair's expert, or E for one that is dropped. Weights are [E, N, D] with any strides, or
[E, 2 * N, D] where a product has two parts: ``parts`` is "", "halves" or "interleaved". They, x and ``bias``, [E, N] or
[E, 2 * N], are float32, bfloat16 or float16; sums are float32, and float32 is multiplied as TF32 where
``torch.backends.cuda.matmul.allow_tf32`` says so. ``epilogue`` is what follows a product within its program,
see ``programs`` and ``epilogues``. No gradients.

Sizes of programs are lists of ints, those of several choices one after the other: the first call tries them all then, on its
data, and later calls take the fastest.

Many rows, sorted by expert, where ``order`` int64 [S] is the pair of each row, dropped ones last::

    cut_rows(ends, order, rows) -> blocks

Cut rows into blocks of one expert and at most so many rows. ``ends`` int32 [E] says where each expert's rows end. ::

    block_linear(x, order, blocks, weight, bias, top_k, scatter, parts, epilogue, sizes) -> y

Multiply each row by its expert's weight: y [S, N]. x is [T, D] and each row takes its token's, or with top_k 0 [S, D]. y lies
in rows, or with ``scatter`` in pairs. ``sizes``: of ``sizes.Size``, with the ``rows`` that the blocks were cut with. ::

    pair_sum(y, experts, weights, top_k, num_experts) -> total

Add up the kept pairs of each token, each times its weight if there are weights [S]: y [S, N] in pairs, total [T, N].

Few rows, which are pairs from the start::

    pair_linear(x, experts, weight, bias, top_k, parts, epilogue, sizes) -> y
    pair_combine(x, experts, weights, weight, bias, top_k, epilogue, sizes) -> total

The first is ``block_linear`` with x [T, D], or [S, D] where top_k is 1; the second multiplies [S, D] in one part, weights and
adds up. ``sizes``: of ``sizes.PairSize``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from modes_fx.kernels.cuda import programs
from modes_fx.kernels.cuda.epilogues import Config, program_with, tuned
from modes_fx.kernels.cuda.sizes import PairSize, Size

_STEP = 64
_SUM_COLUMNS = 1024
_PAIR_STAGES = 3


def _cut_rows(ends: Tensor, order: Tensor, rows: int) -> Tensor:
    experts = ends.shape[0]
    most = order.shape[0] // rows + experts  # each expert has one block that is not full, at most
    blocks = ends.new_empty(3, most)
    padded = 1 << (experts - 1).bit_length()
    wrap_triton(programs.cut_rows)[(experts + 1,)](ends, blocks, most, experts, padded, rows, _STEP)
    return blocks


def _block_linear(
    x: Tensor, order: Tensor, blocks: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, scatter: bool, parts: str,
    epilogue: str, sizes: Sequence[int],
) -> Tensor:  # fmt: skip
    choices = [Size(*sizes[start : start + 5]) for start in range(0, len(sizes), 5)]
    columns, width, halves = _columns(weight, parts), x.shape[1], x.element_size() // 2
    configs = [
        _config(_tile(columns, size.columns), _tile(width, size.inner // halves), size.warps, size.stages) for size in choices
    ]
    y = x.new_empty(order.shape[0], columns)
    _launch(
        programs.block_linear, epilogue, configs, lambda tile: (blocks.shape[1] * _parts(columns, tile),),
        x.contiguous(), weight, _read(bias, weight), y, order, blocks, blocks.shape[1], *weight.stride(), columns, width,
        top_k or 1, top_k > 0, scatter, parts, bias is not None, _precision(x), choices[0].rows,
    )  # fmt: skip
    return y


def _pair_linear(
    x: Tensor, experts: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, parts: str, epilogue: str, sizes: Sequence[int]
) -> Tensor:
    columns, width = _columns(weight, parts), x.shape[1]
    y = x.new_empty(experts.shape[0], columns)
    _launch(
        programs.pair_linear, epilogue, _pair_configs(sizes, width),
        lambda tile: (experts.shape[0], _parts(columns, tile)),
        x.contiguous(), weight, _read(bias, weight), y, experts, *weight.stride(), weight.shape[0], columns,
        width, top_k, parts, bias is not None,
    )  # fmt: skip
    return y


def _pair_combine(
    x: Tensor, experts: Tensor, weights: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, epilogue: str,
    sizes: Sequence[int],
) -> Tensor:  # fmt: skip
    columns, width, tokens = _columns(weight, ""), x.shape[1], experts.shape[0] // top_k
    total = x.new_empty(tokens, columns)
    _launch(
        programs.pair_combine, epilogue, _pair_configs(sizes, width), lambda tile: (tokens, _parts(columns, tile)),
        x.contiguous(), weight, _read(bias, weight), total, experts, weights.contiguous(),
        *weight.stride(), weight.shape[0], columns, width, top_k, bias is not None,
    )  # fmt: skip
    return total


def _launch(
    program: Any, epilogue: str, configs: Sequence[Config], grid: Callable[[int], tuple[int, ...]], *arguments: Any
) -> None:
    """Run a program of one configuration, or of the fastest: ``grid`` of its columns."""
    program, configs = program_with(program, epilogue), tuple(dict.fromkeys(configs))
    if len(configs) > 1:
        wrap_triton(tuned(program, configs))[lambda constants: grid(constants["COLUMNS"])](*arguments)
        return
    ((constants, warps, stages),) = configs
    named = dict(constants)
    wrap_triton(program)[grid(named["COLUMNS"])](*arguments, **named, num_warps=warps, num_stages=stages)


def _config(columns: int, inner: int, warps: int, stages: int) -> Config:
    return (("COLUMNS", columns), ("INNER", inner)), warps, stages


def _pair_configs(sizes: Sequence[int], width: int) -> list[Config]:
    choices = [PairSize(*sizes[start : start + 3]) for start in range(0, len(sizes), 3)]
    return [_config(size.columns, _tile(width, size.inner), size.warps, _PAIR_STAGES) for size in choices]


def _pair_sum(y: Tensor, experts: Tensor, weights: Tensor | None, top_k: int, num_experts: int) -> Tensor:
    columns, tokens = y.shape[1], experts.shape[0] // top_k
    total = y.new_empty(tokens, columns)
    tile = _tile(columns, _SUM_COLUMNS)
    wrap_triton(programs.pair_sum)[(tokens, _parts(columns, tile))](
        y.contiguous(), total, experts, y if weights is None else weights.contiguous(), num_experts, columns, top_k,
        weights is not None, tile,
    )  # fmt: skip
    return total


def _read(bias: Tensor | None, other: Tensor) -> Tensor:
    """Return what a program takes as bias; one that it does not read where there is none."""
    return other if bias is None else bias.contiguous()


def _columns(weight: Tensor, parts: str) -> int:
    return weight.shape[1] // 2 if parts else weight.shape[1]


def _parts(length: int, part: int) -> int:
    return -(-length // part)


def _tile(length: int, most: int) -> int:
    """Return a power of two for a dimension, of at least 16, which tensor cores ask for."""
    return min(most, max(16, 1 << (length - 1).bit_length()))


def _precision(x: Tensor) -> str:
    return "tf32" if x.dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _define(function: Callable[..., Tensor], shape: Callable[..., Tensor]) -> Any:
    """Make an operation of a function; ``shape`` makes an empty result, for traces, without Triton."""
    operation: Any = triton_op(f"modes_fx::{function.__name__.lstrip('_')}", function, mutates_args=())
    operation.register_fake(shape)
    return operation._opoverload


cut_rows = _define(_cut_rows, lambda ends, order, rows: ends.new_empty(3, order.shape[0] // rows + ends.shape[0]))
block_linear = _define(
    _block_linear,
    lambda x, order, blocks, weight, bias, top_k, scatter, parts, epilogue, sizes: x.new_empty(
        order.shape[0], _columns(weight, parts)
    ),
)
pair_linear = _define(
    _pair_linear,
    lambda x, experts, weight, bias, top_k, parts, epilogue, sizes: x.new_empty(experts.shape[0], _columns(weight, parts)),
)
pair_combine = _define(
    _pair_combine,
    lambda x, experts, weights, weight, bias, top_k, epilogue, sizes: x.new_empty(experts.shape[0] // top_k, weight.shape[1]),
)
pair_sum = _define(
    _pair_sum, lambda y, experts, weights, top_k, num_experts: y.new_empty(experts.shape[0] // top_k, y.shape[1])
)
