"""The Triton programs: experts over kept pairs alone, with fixed shapes and nothing read on the host.

T tokens, K experts a token, S = T * K pairs, E experts, D inner and N outer size. ``experts`` int32 [S] holds each pair's
expert, and E for a pair that is dropped. Memory of rows that nobody computes is never written, and never read. No atomics: a
result is bit by bit the same each time.

What follows a product within its program is ``_epilogue(a, b, bias_a, bias_b)``, float32; here it is ``a``, and
``epilogues.program_with`` puts another in its place. Where ``PARTS`` is "", a is the product [.., N]. Else that has 2 * N
columns: "halves", a the first and b the second, or "interleaved", a the even ones and b the odd ones. The biases are
those of the expert and of the same columns, where BIASED, else 0.
"""

# Triton compiles these functions' source: no annotations but its own, and names in capitals for what is constant.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def cut_rows(ends, blocks, most, E: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr):
    """Cut each expert's rows into blocks; program E marks those that are left over.

    ``ends`` int32 [E]: where the rows of each expert end. ``blocks`` int32 [3, most]: expert (-1 for none), first row, end.
    """
    mine = tl.program_id(0)
    index = tl.arange(0, PADDED)
    end = tl.load(ends + index, mask=index < E, other=0)
    start = tl.load(ends + index - 1, mask=(index > 0) & (index < E), other=0)
    counts = tl.where(index < E, (end - start + ROWS - 1) // ROWS, 0)
    first = tl.sum(tl.where(index < mine, counts, 0), 0)
    count = tl.sum(tl.where(index == mine, counts, 0), 0)
    row = tl.sum(tl.where(index == mine, start, 0), 0)
    stop = tl.sum(tl.where(index == mine, end, 0), 0)
    left = mine == E
    last = tl.where(left, most, first + count)
    expert = tl.where(left, -1, mine)
    for base in range(first, last, STEP):
        block = base + tl.arange(0, STEP)
        inside = block < last
        begin = row + (block - first) * ROWS
        tl.store(blocks + block, tl.zeros((STEP,), tl.int32) + expert, mask=inside)
        tl.store(blocks + most + block, begin, mask=inside)
        tl.store(blocks + 2 * most + block, tl.minimum(begin + ROWS, stop), mask=inside)


@triton.jit
def block_linear(
    x, weight, bias, out, order, blocks, most, stride_e, stride_n, stride_d, N: tl.constexpr, D: tl.constexpr,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr, PARTS: tl.constexpr, BIASED: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Multiply a block of rows of one expert by a tile of its weight [N, D]; columns fastest, so that blocks share rows.

    ``order`` int64 [S]: the pair of each row. ``GATHER``: x is [T, D], else [S, D] in rows. ``SCATTER``: results go to the
    place of their pair, else of their row.
    """
    tiles = tl.cdiv(N, COLUMNS)
    block = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    expert = tl.load(blocks + block).to(tl.int64)
    if expert < 0:
        return
    rows = tl.load(blocks + most + block) + tl.arange(0, ROWS)
    live = rows < tl.load(blocks + 2 * most + block)
    pairs = rows.to(tl.int64)
    if GATHER or SCATTER:
        pairs = tl.load(order + rows, mask=live, other=0)
    source = pairs // TOP_K if GATHER else rows.to(tl.int64)
    AT_ONCE: tl.constexpr = 2 if PARTS == "interleaved" else 1
    columns = tile * COLUMNS * AT_ONCE + tl.arange(0, COLUMNS * AT_ONCE)
    inner = tl.arange(0, INNER)
    taken = x + source[:, None] * D + inner[None, :]
    matrix = weight + expert * stride_e + columns[None, :].to(tl.int64) * stride_n + inner[:, None] * stride_d
    inside = (columns < N * AT_ONCE)[None, :]
    total = tl.zeros((ROWS, COLUMNS * AT_ONCE), tl.float32)
    other = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, D, INNER):
        if D % INNER == 0:
            a = tl.load(taken, mask=live[:, None], other=0.0)
        else:
            a = tl.load(taken, mask=live[:, None] & (inner < D - begin)[None, :], other=0.0)
        if D % INNER == 0 and N % COLUMNS == 0:
            b = tl.load(matrix)
        else:
            b = tl.load(matrix, mask=inside & (inner < D - begin)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        if PARTS == "halves":
            if D % INNER == 0 and N % COLUMNS == 0:
                c = tl.load(matrix + N * stride_n)
            else:
                c = tl.load(matrix + N * stride_n, mask=inside & (inner < D - begin)[:, None], other=0.0)
            other = tl.dot(a, c, other, input_precision=PRECISION)
        taken += INNER
        matrix += INNER * stride_d
    if PARTS == "interleaved":
        total, other = tl.split(tl.reshape(total, (ROWS, COLUMNS, 2)))
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    bias_a, bias_b = _biases(bias, expert, columns, N, PARTS, BIASED)
    result = _epilogue(total, other, bias_a, bias_b)
    place = pairs if SCATTER else rows.to(tl.int64)
    inside = live[:, None] & (columns < N)[None, :]
    tl.store(out + place[:, None] * N + columns[None, :], result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def pair_linear(
    x, weight, bias, out, experts, stride_e, stride_n, stride_d, E: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    TOP_K: tl.constexpr, PARTS: tl.constexpr, BIASED: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Multiply one pair's row by a tile of its expert's weight: for so few rows that no two are likely to share an expert."""
    pair = tl.program_id(0)
    expert = tl.load(experts + pair).to(tl.int64)
    if expert >= E:
        return
    AT_ONCE: tl.constexpr = 2 if PARTS == "interleaved" else 1
    columns = tl.program_id(1) * COLUMNS * AT_ONCE + tl.arange(0, COLUMNS * AT_ONCE)
    inner = tl.arange(0, INNER)
    taken = x + (pair // TOP_K).to(tl.int64) * D + inner
    matrix = weight + expert * stride_e + columns[:, None].to(tl.int64) * stride_n + inner[None, :] * stride_d
    total = tl.zeros((COLUMNS * AT_ONCE, INNER), tl.float32)
    other = tl.zeros((COLUMNS, INNER), tl.float32)
    for begin in range(0, D, INNER):
        here = inner < D - begin
        both = (columns < N * AT_ONCE)[:, None] & here[None, :]
        a = tl.load(taken, mask=here, other=0.0).to(tl.float32)[None, :]
        total += tl.load(matrix, mask=both, other=0.0).to(tl.float32) * a
        if PARTS == "halves":
            other += tl.load(matrix + N * stride_n, mask=both, other=0.0).to(tl.float32) * a
        taken += INNER
        matrix += INNER * stride_d
    product, second = tl.sum(total, 1), tl.sum(other, 1)
    if PARTS == "interleaved":
        product, second = tl.split(tl.reshape(product, (COLUMNS, 2)))
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    bias_a, bias_b = _biases(bias, expert, columns, N, PARTS, BIASED)
    result = _epilogue(product, second, bias_a, bias_b)
    tl.store(out + pair.to(tl.int64) * N + columns, result.to(out.dtype.element_ty), mask=columns < N)


@triton.jit
def pair_combine(
    x, weight, bias, out, experts, routing, stride_e, stride_n, stride_d, E: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    TOP_K: tl.constexpr, BIASED: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Multiply the rows of a token's pairs by a tile of their experts' weights, and add them up, each times its ``routing``."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    total = tl.zeros((COLUMNS,), tl.float32)
    for rank in range(TOP_K):
        pair = (token * TOP_K + rank).to(tl.int64)
        expert = tl.load(experts + pair).to(tl.int64)
        if expert < E:
            taken = x + pair * D + inner
            matrix = weight + expert * stride_e + columns[:, None].to(tl.int64) * stride_n + inner[None, :] * stride_d
            product = tl.zeros((COLUMNS, INNER), tl.float32)
            for begin in range(0, D, INNER):
                here = inner < D - begin
                a = tl.load(taken, mask=here, other=0.0).to(tl.float32)[None, :]
                product += tl.load(matrix, mask=(columns < N)[:, None] & here[None, :], other=0.0).to(tl.float32) * a
                taken += INNER
                matrix += INNER * stride_d
            result = tl.sum(product, 1)
            bias_a, bias_b = _biases(bias, expert, columns, N, "", BIASED)
            total += _epilogue(result, result, bias_a, bias_b) * tl.load(routing + pair).to(tl.float32)
    tl.store(out + token.to(tl.int64) * N + columns, total.to(out.dtype.element_ty), mask=columns < N)


@triton.jit
def pair_sum(
    x, out, experts, routing, E: tl.constexpr, N: tl.constexpr, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add up the rows [S, N] of each token's kept pairs, each times its ``routing`` where WEIGHTED."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for rank in tl.static_range(TOP_K):
        pair = token * TOP_K + rank
        kept = (tl.load(experts + pair) + tl.zeros((COLUMNS,), tl.int32)) < E
        row = tl.load(x + pair * N + columns, mask=(columns < N) & kept, other=0.0).to(tl.float32)
        if WEIGHTED:
            row *= tl.load(routing + pair).to(tl.float32)
        total += row
    tl.store(out + token * N + columns, total.to(out.dtype.element_ty), mask=columns < N)


@triton.jit
def _biases(bias, expert, columns, N: tl.constexpr, PARTS: tl.constexpr, BIASED: tl.constexpr):
    """Return an expert's biases of both parts of a product, from ``bias`` [E, N], or [E, 2 * N] where there are parts."""
    first = tl.zeros(columns.shape, tl.float32)
    second = first
    if BIASED:
        if PARTS == "":
            first = tl.load(bias + expert * N + columns, mask=columns < N, other=0.0).to(tl.float32)
        else:
            STEP: tl.constexpr = 2 if PARTS == "interleaved" else 1
            place = bias + expert * 2 * N + columns * STEP
            first = tl.load(place, mask=columns < N, other=0.0).to(tl.float32)
            second = tl.load(place + (1 if PARTS == "interleaved" else N), mask=columns < N, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _epilogue(a, b, bias_a, bias_b):
    return a
