"""The Triton kernels of the mixture of experts; `experts.py` launches them.

P = N TOP_K is the number of (token, expert) assignments. `order` [P] lists the assignments sorted by expert: sorted row r is
assignment order[r] of token order[r] // TOP_K. ends [E]: the sorted row at which the assignments of each expert end.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright reads the kernels as Python: `static_range` is not iterable there, and constexprs are not numbers.
from __future__ import annotations

import triton
import triton.language as tl

from qwen35moe_kernels import runtime

# The interpreter multiplies the bit patterns of bfloat16, and takes a constexpr only as the end of `range`.
INTERPRETED = tl.constexpr(runtime.interpreted())


@triton.jit(do_not_specialize=["assignments", "num_tiles"])
def schedule_kernel(
    order, ends, row_of, tiles, assignments, num_tiles, E: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """One program per expert. tiles [2, num_tiles]: the expert and the first row of every tile of BM rows, -1 for unused
    tiles; row_of [P]: the sorted row of every assignment, the inverse of `order`."""
    expert = tl.program_id(0)
    index = tl.arange(0, BE)
    stop = tl.load(ends + index, mask=index < E, other=0)
    start = tl.load(ends + index - 1, mask=(index > 0) & (index < E), other=0)
    needed = tl.where(index < E, (stop - start + BM - 1) // BM, 0)
    before = tl.sum(tl.where(index < expert, needed, 0), axis=0)
    own = tl.sum(tl.where(index == expert, needed, 0), axis=0)
    first = tl.sum(tl.where(index == expert, start, 0), axis=0)
    block = tl.arange(0, B)
    done = 0
    while done < own:
        at = done + block
        tl.store(tiles + before + at, expert + at * 0, mask=at < own)
        tl.store(tiles + num_tiles + before + at, first + at * BM, mask=at < own)
        done += B
    if expert == 0:
        unused = tl.sum(needed, axis=0)
        while unused < num_tiles:
            tl.store(tiles + unused + block, -1 + block * 0, mask=unused + block < num_tiles)
            unused += B
    done = expert * B
    while done < assignments:
        row = done + block
        assignment = tl.load(order + row, mask=row < assignments, other=0)
        tl.store(row_of + assignment, row, mask=row < assignments)
        done += E * B


@triton.jit
def _load(at, inside, EVEN: tl.constexpr):
    """EVEN: the blocks divide the sizes, so no mask is needed."""
    if EVEN:
        value = tl.load(at)
    else:
        value = tl.load(at, mask=inside, other=0.0)
    return value


@triton.jit
def _dot(a, b, total):
    """total + a b, summed in float32."""
    if INTERPRETED:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _rows(order, ends, tiles, tile, expert, num_tiles, BM: tl.constexpr):
    """The rows [BM] of a tile, their assignments, and a mask of the rows that belong to it. Past its end the tile repeats its
    last row, so that loads need no mask."""
    stop = tl.load(ends + expert)
    row = tl.load(tiles + num_tiles + tile) + tl.arange(0, BM)
    inside = row < stop
    row = tl.minimum(row, stop - 1)
    return row.to(tl.int64), tl.load(order + row).to(tl.int64), inside


@triton.jit(do_not_specialize=["num_tiles"])
def up_kernel(
    x, gate_up, order, ends, tiles, act, pre, num_tiles, D: tl.constexpr, F: tl.constexpr, TOP_K: tl.constexpr,
    KEEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """act [P, F] = silu(x W_gate^T) * (x W_up^T) for BM rows, gathered from x [N, D] while loading, and BN columns. KEEP: also
    pre [P, 2F], both products, for the backward."""
    blocks: tl.constexpr = (F + BN - 1) // BN
    tile = tl.program_id(0) // blocks
    expert = tl.load(tiles + tile)
    if expert < 0:
        return
    row, assignment, inside = _rows(order, ends, tiles, tile, expert, num_tiles, BM)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    left_at = x + (assignment // TOP_K)[:, None] * D + k[None, :]
    gate_at = gate_up + expert.to(tl.int64) * (2 * F * D) + n[None, :] * D + k[:, None]
    gate = tl.zeros([BM, BN], dtype=tl.float32)
    up = tl.zeros([BM, BN], dtype=tl.float32)
    for start in range(0, D, BK):
        in_k = k < D - start
        of_weight = in_k[:, None] & (n < F)[None, :]
        left = _load(left_at + start, in_k[None, :], D % BK == 0)
        weight = _load(gate_at + start, of_weight, D % BK == 0 and F % BN == 0)
        gate = _dot(left, weight, gate)
        weight = _load(gate_at + (F * D + start), of_weight, D % BK == 0 and F % BN == 0)
        up = _dot(left, weight, up)
    mask = inside[:, None] & (n < F)[None, :]
    if KEEP:
        at = pre + row[:, None] * (2 * F) + n[None, :]
        tl.store(at, gate.to(pre.dtype.element_ty), mask=mask)
        tl.store(at + F, up.to(pre.dtype.element_ty), mask=mask)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(act + row[:, None] * F + n[None, :], value.to(act.dtype.element_ty), mask=mask)


@triton.jit
def _product(
    left_at, weight_at, k, n, IN: tl.constexpr, OUT: tl.constexpr, w_k: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """[BM, BN] float32: rows of IN elements from pointers left_at [BM, BK] times columns from weight_at [BK, BN]."""
    total = tl.zeros([BM, BN], dtype=tl.float32)
    for start in range(0, IN, BK):
        in_k = k < IN - start
        left = _load(left_at + start, in_k[None, :], IN % BK == 0)
        matrix = _load(weight_at + start * w_k, in_k[:, None] & (n < OUT)[None, :], IN % BK == 0 and OUT % BN == 0)
        total = _dot(left, matrix, total)
    return total


@triton.jit(do_not_specialize=["num_tiles"])
def product_kernel(
    left, weight, order, ends, tiles, out, num_tiles, IN: tl.constexpr, OUT: tl.constexpr, w_k: tl.constexpr,
    w_n: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [P, OUT] = left [P, IN] times the matrix of each row's expert, whose element (k, n) is at k w_k + n w_n."""
    blocks: tl.constexpr = (OUT + BN - 1) // BN
    tile = tl.program_id(0) // blocks
    expert = tl.load(tiles + tile)
    if expert < 0:
        return
    row, _, inside = _rows(order, ends, tiles, tile, expert, num_tiles, BM)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    left_at = left + row[:, None] * IN + k[None, :]
    weight_at = weight + expert.to(tl.int64) * (IN * OUT) + n[None, :] * w_n + k[:, None] * w_k
    total = _product(left_at, weight_at, k, n, IN, OUT, w_k, BM, BN, BK)
    mask = inside[:, None] & (n < OUT)[None, :]
    tl.store(out + row[:, None] * OUT + n[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def combine_kernel(
    rows, row_of, weights, out, D: tl.constexpr, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, BS: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """out [N, D]: the sum of a token's TOP_K rows, weighted if WEIGHTED, always in the same order."""
    token = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, BS)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    row = tl.load(row_of + token * TOP_K + choice, mask=choice < TOP_K, other=0).to(tl.int64)
    mask = (choice < TOP_K)[:, None] & (d < D)[None, :]
    value = tl.load(rows + row[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if WEIGHTED:
        value *= tl.load(weights + token * TOP_K + choice, mask=choice < TOP_K, other=0.0).to(tl.float32)[:, None]
    tl.store(out + token * D + d, tl.sum(value, axis=0).to(out.dtype.element_ty), mask=d < D)


# --------------------------------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=["assignments", "num_tiles"])
def act_gradient_kernel(
    dy, down, pre, weights, order, ends, tiles, dpre, scaled, dweights, assignments, num_tiles, D: tl.constexpr,
    F: tl.constexpr, TOP_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """With g = dy W_down, the gradient of an expert's activation a before the token's weight w:

    dpre [P, 2F], the gradients of both products; scaled [P, F] = w a, an operand of the gradient of `down`; dweights [blocks
    of F, P], the partial sums of dw = <g, a>. dy [N, D] is gathered while loading, a is recomputed from pre.
    """
    blocks: tl.constexpr = (F + BN - 1) // BN
    tile = tl.program_id(0) // blocks
    expert = tl.load(tiles + tile)
    if expert < 0:
        return
    row, assignment, inside = _rows(order, ends, tiles, tile, expert, num_tiles, BM)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    left_at = dy + (assignment // TOP_K)[:, None] * D + k[None, :]
    weight_at = down + expert.to(tl.int64) * (D * F) + k[:, None] * F + n[None, :]
    grad = _product(left_at, weight_at, k, n, D, F, F, BM, BN, BK)
    mask = inside[:, None] & (n < F)[None, :]
    at = row[:, None] * (2 * F) + n[None, :]
    even: tl.constexpr = F % BN == 0
    gate = _load(pre + at, mask, even).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    slope = sigmoid * (1.0 + gate - silu)
    up = _load(pre + at + F, mask, even).to(tl.float32)
    weight = tl.load(weights + assignment).to(tl.float32)[:, None]
    tl.store(scaled + row[:, None] * F + n[None, :], (weight * silu * up).to(scaled.dtype.element_ty), mask=mask)
    part = tl.program_id(0) % blocks * assignments.to(tl.int64) + assignment
    tl.store(dweights + part, tl.sum(grad * silu * up, axis=1), mask=inside)
    grad *= weight
    tl.store(dpre + at, (grad * up * slope).to(dpre.dtype.element_ty), mask=mask)
    tl.store(dpre + at + F, (grad * silu).to(dpre.dtype.element_ty), mask=mask)


@triton.jit
def _outer(
    total, left, right, order, start, stop, m, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOP_K: tl.constexpr,
    LEFT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """total [BM, BN] plus left^T right of BK rows from `start`."""
    row = start + tl.arange(0, BK)
    inside = row < stop
    token = tl.load(order + row, mask=inside, other=0).to(tl.int64) // TOP_K
    row = row.to(tl.int64)
    left_row = token if LEFT else row
    right_row = row if LEFT else token
    a = tl.load(left + left_row[:, None] * ROWS + m[None, :], mask=inside[:, None] & (m < ROWS)[None, :], other=0.0)
    b = tl.load(right + right_row[:, None] * COLUMNS + n[None, :], mask=inside[:, None] & (n < COLUMNS)[None, :], other=0.0)
    return _dot(tl.trans(a), b, total)


@triton.jit
def weight_gradient_kernel(
    left, right, order, ends, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOP_K: tl.constexpr, LEFT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [E, ROWS, COLUMNS] = left^T right summed over the rows of each expert in float32; zero for an expert without rows.

    One operand has a row per token and is gathered while loading, the other a row per assignment. LEFT: the left one has a row
    per token.
    """
    columns: tl.constexpr = (COLUMNS + BN - 1) // BN
    blocks: tl.constexpr = (ROWS + BM - 1) // BM * columns
    expert = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    m = block // columns * BM + tl.arange(0, BM)
    n = block % columns * BN + tl.arange(0, BN)
    stop = tl.load(ends + expert)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    total = tl.zeros([BM, BN], dtype=tl.float32)
    if INTERPRETED:
        while start < stop:
            total = _outer(total, left, right, order, start, stop, m, n, ROWS, COLUMNS, TOP_K, LEFT, BK)
            start += BK
    else:  # the compiler prefetches in a `range` loop only
        for row in range(start, stop, BK):
            total = _outer(total, left, right, order, row, stop, m, n, ROWS, COLUMNS, TOP_K, LEFT, BK)
    at = expert.to(tl.int64) * (ROWS * COLUMNS) + m[:, None] * COLUMNS + n[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(m < ROWS)[:, None] & (n < COLUMNS)[None, :])


# -------------------------------------------------------------------------------------------------------------- few assignments


@triton.jit
def few_up_kernel(
    x, gate_up, indices, act, D: tl.constexpr, F: tl.constexpr, TOP_K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """act [P, F], float32, for one assignment and BN columns. Nothing is sorted; every weight is read once."""
    assignment = tl.program_id(0).to(tl.int64)
    expert = tl.load(indices + assignment).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    weight_at = gate_up + expert * (2 * F * D) + n[:, None] * D + k[None, :]
    gate = tl.zeros([BN, BK], dtype=tl.float32)
    up = tl.zeros([BN, BK], dtype=tl.float32)
    for start in range(0, D, BK):
        in_k = k < D - start
        mask = (n < F)[:, None] & in_k[None, :]
        value = tl.load(x + assignment // TOP_K * D + start + k, mask=in_k, other=0.0).to(tl.float32)[None, :]
        gate += value * tl.load(weight_at + start, mask=mask, other=0.0).to(tl.float32)
        up += value * tl.load(weight_at + (F * D + start), mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(gate, axis=1)
    tl.store(act + assignment * F + n, total / (1.0 + tl.exp(-total)) * tl.sum(up, axis=1), mask=n < F)


@triton.jit
def few_down_kernel(
    act, down, indices, weights, out, D: tl.constexpr, F: tl.constexpr, TOP_K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """out [N, D], the weighted sum over the experts of one token, BN columns."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    total = tl.zeros([BN, BK], dtype=tl.float32)
    for choice in range(TOP_K):
        assignment = token * TOP_K + choice
        expert = tl.load(indices + assignment).to(tl.int64)
        weight = tl.load(weights + assignment).to(tl.float32)
        weight_at = down + expert * (D * F) + n[:, None] * F + k[None, :]
        for start in range(0, F, BK):
            in_k = k < F - start
            value = tl.load(act + assignment * F + start + k, mask=in_k, other=0.0) * weight
            mask = (n < D)[:, None] & in_k[None, :]
            total += value[None, :] * tl.load(weight_at + start, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * D + n, tl.sum(total, axis=1).to(out.dtype.element_ty), mask=n < D)
