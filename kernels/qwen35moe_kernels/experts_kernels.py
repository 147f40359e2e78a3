"""The Triton kernels of the mixture of experts; `experts.py` launches them.

A pair is a token and one of its slots, P = N S of them. `order` [P] lists the pairs sorted by expert: row r of what is
sorted belongs to pair order[r] and to token order[r] // S. ends [E] are the rows at which the experts' pairs end.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# Inside a kernel Python stands for Triton: its `static_range` is no iterable, its constexprs are numbers.
from __future__ import annotations

import triton
import triton.language as tl

from qwen35moe_kernels import runtime

# The interpreter takes neither the product of bfloat16 for what it is nor `range` to a number that is no constexpr.
INTERPRETED = tl.constexpr(runtime.interpreted())


@triton.jit(do_not_specialize=["P", "T"])
def schedule_kernel(order, ends, place, tiles, P, T, E: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, B: tl.constexpr):
    """One program per expert. tiles [2, T]: the expert and the first row of every tile of BM rows, -1 where there is
    none; place [P]: the row of every pair, the inverse of `order`."""
    expert = tl.program_id(0)
    every = tl.arange(0, BE)
    stop = tl.load(ends + every, mask=every < E, other=0)
    start = tl.load(ends + every - 1, mask=(every > 0) & (every < E), other=0)
    needed = tl.where(every < E, (stop - start + BM - 1) // BM, 0)
    before = tl.sum(tl.where(every < expert, needed, 0), axis=0)
    own = tl.sum(tl.where(every == expert, needed, 0), axis=0)
    first = tl.sum(tl.where(every == expert, start, 0), axis=0)
    block = tl.arange(0, B)
    done = 0
    while done < own:
        at = done + block
        tl.store(tiles + before + at, expert + at * 0, mask=at < own)
        tl.store(tiles + T + before + at, first + at * BM, mask=at < own)
        done += B
    if expert == 0:
        unused = tl.sum(needed, axis=0)
        while unused < T:
            tl.store(tiles + unused + block, -1 + block * 0, mask=unused + block < T)
            unused += B
    done = expert * B
    while done < P:
        row = done + block
        pair = tl.load(order + row, mask=row < P, other=0)
        tl.store(place + pair, row, mask=row < P)
        done += E * B


@triton.jit
def _load(at, inside, EVEN: tl.constexpr):
    """EVEN: the blocks divide the sizes, nothing is to be masked."""
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
def _rows(order, ends, tiles, tile, expert, T, BM: tl.constexpr):
    """The rows [BM] of a tile, their pairs, and which of them are its own. Past its end it repeats its last row, so that
    nothing need be masked where rows are read."""
    stop = tl.load(ends + expert)
    row = tl.load(tiles + T + tile) + tl.arange(0, BM)
    inside = row < stop
    row = tl.minimum(row, stop - 1)
    return row.to(tl.int64), tl.load(order + row).to(tl.int64), inside


@triton.jit(do_not_specialize=["T"])
def up_kernel(
    x, gate_up, order, ends, tiles, act, pre, T, D: tl.constexpr, F: tl.constexpr, S: tl.constexpr, KEEP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """act [P, F] = silu(x W_gate^T) * (x W_up^T) of BM rows, gathered from x [N, D] as they are read, and BN columns.
    KEEP: also pre [P, 2F], the two products, for the backward."""
    blocks: tl.constexpr = (F + BN - 1) // BN
    tile = tl.program_id(0) // blocks
    expert = tl.load(tiles + tile)
    if expert < 0:
        return
    row, pair, inside = _rows(order, ends, tiles, tile, expert, T, BM)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    left_at = x + (pair // S)[:, None] * D + k[None, :]
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


@triton.jit(do_not_specialize=["T"])
def product_kernel(
    left, weight, order, ends, tiles, out, T, K: tl.constexpr, N: tl.constexpr, w_k: tl.constexpr, w_n: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [P, N] = left [P, K] times each row's expert's matrix, whose element (k, n) stands at k w_k + n w_n."""
    blocks: tl.constexpr = (N + BN - 1) // BN
    tile = tl.program_id(0) // blocks
    expert = tl.load(tiles + tile)
    if expert < 0:
        return
    row, _, inside = _rows(order, ends, tiles, tile, expert, T, BM)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    left_at = left + row[:, None] * K + k[None, :]
    weight_at = weight + expert.to(tl.int64) * (K * N) + n[None, :] * w_n + k[:, None] * w_k
    total = tl.zeros([BM, BN], dtype=tl.float32)
    for start in range(0, K, BK):
        in_k = k < K - start
        value = _load(left_at + start, in_k[None, :], K % BK == 0)
        matrix = _load(weight_at + start * w_k, in_k[:, None] & (n < N)[None, :], K % BK == 0 and N % BN == 0)
        total = _dot(value, matrix, total)
    mask = inside[:, None] & (n < N)[None, :]
    tl.store(out + row[:, None] * N + n[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def combine_kernel(
    rows, place, weights, out, D: tl.constexpr, S: tl.constexpr, WEIGHTED: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """out [N, D]: the sum of a token's S rows, each times its weight where WEIGHTED; always in the same order."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BS)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    row = tl.load(place + token * S + slot, mask=slot < S, other=0).to(tl.int64)
    mask = (slot < S)[:, None] & (d < D)[None, :]
    value = tl.load(rows + row[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if WEIGHTED:
        value *= tl.load(weights + token * S + slot, mask=slot < S, other=0.0).to(tl.float32)[:, None]
    tl.store(out + token * D + d, tl.sum(value, axis=0).to(out.dtype.element_ty), mask=d < D)


# --------------------------------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=["P", "T"])
def act_gradient_kernel(
    dy, down, pre, weights, order, ends, tiles, dpre, scaled, shares, P, T, D: tl.constexpr, F: tl.constexpr,
    S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """With g = dy W_down, the gradient of an expert's activation a before the token's weight w:

    dpre [P, 2F], the gradients of the two products; scaled [P, F] = w a, which the gradient of `down` needs;
    shares [blocks of F, P], the parts of dw = <g, a>. dy [N, D] is gathered as it is read, a is computed again from pre.
    """
    blocks: tl.constexpr = (F + BN - 1) // BN
    tile = tl.program_id(0) // blocks
    expert = tl.load(tiles + tile)
    if expert < 0:
        return
    row, pair, inside = _rows(order, ends, tiles, tile, expert, T, BM)
    n = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    left_at = dy + (pair // S)[:, None] * D + k[None, :]
    weight_at = down + expert.to(tl.int64) * (D * F) + k[:, None] * F + n[None, :]
    grad = tl.zeros([BM, BN], dtype=tl.float32)
    for start in range(0, D, BK):
        in_k = k < D - start
        left = _load(left_at + start, in_k[None, :], D % BK == 0)
        matrix = _load(weight_at + start * F, in_k[:, None] & (n < F)[None, :], D % BK == 0 and F % BN == 0)
        grad = _dot(left, matrix, grad)
    mask = inside[:, None] & (n < F)[None, :]
    at = row[:, None] * (2 * F) + n[None, :]
    even: tl.constexpr = F % BN == 0
    gate = _load(pre + at, mask, even).to(tl.float32)
    open_ = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * open_
    slope = open_ * (1.0 + gate - silu)
    up = _load(pre + at + F, mask, even).to(tl.float32)
    weight = tl.load(weights + pair).to(tl.float32)[:, None]
    tl.store(scaled + row[:, None] * F + n[None, :], (weight * silu * up).to(scaled.dtype.element_ty), mask=mask)
    share = tl.program_id(0) % blocks * P.to(tl.int64) + pair
    tl.store(shares + share, tl.sum(grad * silu * up, axis=1), mask=inside)
    grad *= weight
    tl.store(dpre + at, (grad * up * slope).to(dpre.dtype.element_ty), mask=mask)
    tl.store(dpre + at + F, (grad * silu).to(dpre.dtype.element_ty), mask=mask)


@triton.jit
def _outer(
    total, left, right, order, start, stop, m, n, M: tl.constexpr, N: tl.constexpr, S: tl.constexpr, LEFT: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """total [BM, BN] plus left^T right of BK rows from `start`."""
    row = start + tl.arange(0, BK)
    inside = row < stop
    token = tl.load(order + row, mask=inside, other=0).to(tl.int64) // S
    row = row.to(tl.int64)
    of_left = token if LEFT else row
    of_right = row if LEFT else token
    a = tl.load(left + of_left[:, None] * M + m[None, :], mask=inside[:, None] & (m < M)[None, :], other=0.0)
    b = tl.load(right + of_right[:, None] * N + n[None, :], mask=inside[:, None] & (n < N)[None, :], other=0.0)
    return _dot(tl.trans(a), b, total)


@triton.jit
def weight_gradient_kernel(
    left, right, order, ends, out, M: tl.constexpr, N: tl.constexpr, S: tl.constexpr, LEFT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [E, M, N] = sum over an expert's rows of left^T right, float32 until the end; zeros where it has none.

    One of the two belongs to tokens and is gathered as it is read, the other to rows. LEFT: it is the left one.
    """
    columns: tl.constexpr = (N + BN - 1) // BN
    blocks: tl.constexpr = (M + BM - 1) // BM * columns
    expert = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    m = block // columns * BM + tl.arange(0, BM)
    n = block % columns * BN + tl.arange(0, BN)
    stop = tl.load(ends + expert)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    total = tl.zeros([BM, BN], dtype=tl.float32)
    if INTERPRETED:
        while start < stop:
            total = _outer(total, left, right, order, start, stop, m, n, M, N, S, LEFT, BK)
            start += BK
    else:  # compiled, only `range` is loaded ahead
        for row in range(start, stop, BK):
            total = _outer(total, left, right, order, row, stop, m, n, M, N, S, LEFT, BK)
    at = expert.to(tl.int64) * (M * N) + m[:, None] * N + n[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


# -------------------------------------------------------------------------------------------------------------- few pairs


@triton.jit
def few_up_kernel(
    x, gate_up, indices, act, D: tl.constexpr, F: tl.constexpr, S: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """act [P, F], float32, of one pair and BN columns, whose weights are read once. Nothing is sorted."""
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(indices + pair).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    weight_at = gate_up + expert * (2 * F * D) + n[:, None] * D + k[None, :]
    gate = tl.zeros([BN, BK], dtype=tl.float32)
    up = tl.zeros([BN, BK], dtype=tl.float32)
    for start in range(0, D, BK):
        in_k = k < D - start
        mask = (n < F)[:, None] & in_k[None, :]
        value = tl.load(x + pair // S * D + start + k, mask=in_k, other=0.0).to(tl.float32)[None, :]
        gate += value * tl.load(weight_at + start, mask=mask, other=0.0).to(tl.float32)
        up += value * tl.load(weight_at + (F * D + start), mask=mask, other=0.0).to(tl.float32)
    total = tl.sum(gate, axis=1)
    tl.store(act + pair * F + n, total / (1.0 + tl.exp(-total)) * tl.sum(up, axis=1), mask=n < F)


@triton.jit
def few_down_kernel(
    act, down, indices, weights, out, D: tl.constexpr, F: tl.constexpr, S: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """out [N, D], the weighted sum over a token's slots, of one token and BN columns."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    total = tl.zeros([BN, BK], dtype=tl.float32)
    for slot in range(S):
        pair = token * S + slot
        expert = tl.load(indices + pair).to(tl.int64)
        weight = tl.load(weights + pair).to(tl.float32)
        weight_at = down + expert * (D * F) + n[:, None] * F + k[None, :]
        for start in range(0, F, BK):
            in_k = k < F - start
            value = tl.load(act + pair * F + start + k, mask=in_k, other=0.0) * weight
            mask = (n < D)[:, None] & in_k[None, :]
            total += value[None, :] * tl.load(weight_at + start, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * D + n, tl.sum(total, axis=1).to(out.dtype.element_ty), mask=n < D)
