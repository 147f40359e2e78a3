"""The gated delta rule forward, in chunks of 64 tokens: three kernels.

For one value head and the tokens i, j = 1 ... M of a chunk, with unit queries q and keys k, the recurrent state S_0 before the
chunk, d_ij = exp(decay_{j+1} + ... + decay_i) for j <= i and a_ij = beta_i d_ij (k_i . k_j) for j < i:

    prepare     x = (I + a)^-1                                                              each chunk on its own
    recur       delta_i = beta_i (v_i - d_i0 S_0^T k_i),   w_i = sum_j x_ij delta_j         chunk after chunk
                S_M = d_M0 S_0 + sum_j d_Mj k_j (x) w_j
    outputs     o_i = (d_i0 S_0^T q_i + sum_j d_ij (q_i . k_j) w_j) / sqrt(K)               each chunk on its own

docs/reference/delta_rule.md derives them; its x has the factor diag(beta), which is in delta here. Products take unnormalised
queries and keys, and their inverse norms go into the float32 factors, so that normalising rounds nothing. Sums, decays, states
and the inverse are computed in float32; products have operands of the inputs' dtype.
"""

# pyright: reportInvalidTypeForm=false, reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from qwen35moe_kernels.delta_rule_tiles import (
    PRECISION,
    decay_factor,
    decays_between,
    load_column,
    load_inverse,
    load_rows,
    load_sums,
    product,
    span_of_chunk,
    span_of_sequence,
    split,
    store_column,
    store_rows,
)

BLOCK = tl.constexpr(16)


@triton.jit
def _without_column(a, x, j):
    """Step j = 0 ... 14 of the inverse x of I + a [16, 16], starting with x = I: subtracts column j of a times row j of x,
    which changes the rows below j only.

    Powers of a would lose five digits at equal keys, even in a block of 16.
    """
    i = tl.arange(0, 16)
    column = tl.sum(tl.where(i[None, :] == j, a, 0.0), axis=1)
    row = tl.sum(tl.where(i[:, None] == j, x, 0.0), axis=0)
    return x - column[:, None] * row[None, :]


@triton.jit
def _product32(a, b):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _keys_part(key, squares, begin, end, k_token, first, K: tl.constexpr, BK: tl.constexpr):
    """16 keys, BK columns, and their running sums of squares."""
    k = load_rows(key, begin, end, k_token, first, K, BLOCK, BK)
    wide = k.to(tl.float32)
    return k, squares + tl.sum(wide * wide, axis=1)


@triton.jit
def _store_norm(norms, squares, begin, end, G: tl.constexpr):
    """The inverse norms of 16 queries or keys, stored and returned."""
    length = 1.0 / tl.sqrt(squares + 1e-6)
    store_column(norms, length, begin, end, G, BLOCK)
    return length


@triton.jit
def _block_of_gates(decay, beta, sums, begin, end, h, total, coarse_before, fine_before, H: tl.constexpr):
    """For 16 tokens: the chunk's running sums of the log decay, which are stored, beta, and the sums after the last token."""
    coarse, fine = split(load_column(decay + h, begin, end, H, BLOCK))
    coarse_sum = coarse_before + tl.cumsum(coarse, axis=0)
    fine_sum = fine_before + tl.cumsum(fine, axis=0)
    store_column(sums + h, coarse_sum, begin, end, H, BLOCK)
    store_column(sums + total * H + h, fine_sum, begin, end, H, BLOCK)
    beta = load_column(beta + h, begin, end, H, BLOCK)
    return coarse_sum, fine_sum, beta, coarse_before + tl.sum(coarse, axis=0), fine_before + tl.sum(fine, axis=0)


@triton.jit
def _system(scores, length_i, coarse_i, fine_i, beta_i, length_j, coarse_j, fine_j, DIAGONAL: tl.constexpr):
    """A block of a."""
    scores = scores * length_i[:, None] * length_j[None, :]
    logs = (coarse_i[:, None] - coarse_j[None, :]) + (fine_i[:, None] - fine_j[None, :])
    if DIAGONAL:
        i = tl.arange(0, 16)
        logs = tl.where(i[:, None] > i[None, :], logs, float("-inf"))
    return beta_i[:, None] * scores * decay_factor(logs)


@triton.jit
def _store_inverse(to, x0, x1, x2, x3, x10, x20, x30, x21, x31, x32, t0, end, H: tl.constexpr):
    """The blocks x_i on the diagonal and x_ij below it, and zeros above it: `load_inverse` then masks whole rows only."""
    t1, t2, t3 = t0 + 16, t0 + 32, t0 + 48
    empty = tl.zeros([BLOCK, BLOCK], tl.float32)
    store_rows(to, x0, t0, end, H * 64, 0, 64, BLOCK, BLOCK)
    store_rows(to, x10, t1, end, H * 64, 0, 64, BLOCK, BLOCK)
    store_rows(to, x1, t1, end, H * 64, 16, 64, BLOCK, BLOCK)
    store_rows(to, x20, t2, end, H * 64, 0, 64, BLOCK, BLOCK)
    store_rows(to, x21, t2, end, H * 64, 16, 64, BLOCK, BLOCK)
    store_rows(to, x2, t2, end, H * 64, 32, 64, BLOCK, BLOCK)
    store_rows(to, x30, t3, end, H * 64, 0, 64, BLOCK, BLOCK)
    store_rows(to, x31, t3, end, H * 64, 16, 64, BLOCK, BLOCK)
    store_rows(to, x32, t3, end, H * 64, 32, 64, BLOCK, BLOCK)
    store_rows(to, x3, t3, end, H * 64, 48, 64, BLOCK, BLOCK)
    wide = tl.zeros([BLOCK, 32], tl.float32)
    store_rows(to, empty, t0, end, H * 64, 16, 64, BLOCK, BLOCK)
    store_rows(to, wide, t0, end, H * 64, 32, 64, BLOCK, 32)
    store_rows(to, wide, t1, end, H * 64, 32, 64, BLOCK, 32)
    store_rows(to, empty, t2, end, H * 64, 48, 64, BLOCK, BLOCK)


@triton.jit(do_not_specialize=["tokens", "total"])
def prepare(
    query, key, decay, beta, inverse, sums, norms, spans, tokens, total, q_token, q_head, k_token, k_head,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, PACKED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One chunk of one value head: (I + a)^-1 [T, H, M] and the running sums [2, T, H] of the log decays; the first value head
    of a key head also stores the inverse norms [2, T, G] of its queries and keys.

    The inverse is built from blocks of 16: with the blocks a_ij of a and the diagonal blocks x_i of the inverse,
    x_ij = -x_i sum_{j <= l < i} a_il x_lj. The products of keys are repeated for every value head of a key head: kept for
    several heads they would spill registers, and they are the smaller part of the work.
    """
    chunk, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    g = h // (H // G)
    t0, end = span_of_chunk(spans, chunk, tokens, PACKED, 64)
    t1, t2, t3 = t0 + 16, t0 + 32, t0 + 48
    norms_end = tl.where(h % (H // G) == 0, end, 0)  # only the first value head of a key head stores norms
    if h % (H // G) == 0:
        for part in range(4):
            _, squares = _keys_part(query + g * q_head, 0.0, t0 + 16 * part, end, q_token, 0, K, KP)
            _store_norm(norms + g, squares, t0 + 16 * part, end, G)
    key += g * k_head
    ROUND: tl.constexpr = key.dtype.element_ty
    empty, none = tl.zeros([BLOCK, BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    s00, s11, s22, s33, s10, s20, s30, s21, s31, s32 = empty, empty, empty, empty, empty, empty, empty, empty, empty, empty
    l0, l1, l2, l3 = none, none, none, none
    for first in range(0, K, BK):
        k0, l0 = _keys_part(key, l0, t0, end, k_token, first, K, BK)
        k1, l1 = _keys_part(key, l1, t1, end, k_token, first, K, BK)
        k2, l2 = _keys_part(key, l2, t2, end, k_token, first, K, BK)
        k3, l3 = _keys_part(key, l3, t3, end, k_token, first, K, BK)
        s00 += product(k0, tl.trans(k0), ROUND, WIDEN)
        s11 += product(k1, tl.trans(k1), ROUND, WIDEN)
        s22 += product(k2, tl.trans(k2), ROUND, WIDEN)
        s33 += product(k3, tl.trans(k3), ROUND, WIDEN)
        s10 += product(k1, tl.trans(k0), ROUND, WIDEN)
        s20 += product(k2, tl.trans(k0), ROUND, WIDEN)
        s30 += product(k3, tl.trans(k0), ROUND, WIDEN)
        s21 += product(k2, tl.trans(k1), ROUND, WIDEN)
        s31 += product(k3, tl.trans(k1), ROUND, WIDEN)
        s32 += product(k3, tl.trans(k2), ROUND, WIDEN)
    l0 = _store_norm(norms + total * G + g, l0, t0, norms_end, G)
    l1 = _store_norm(norms + total * G + g, l1, t1, norms_end, G)
    l2 = _store_norm(norms + total * G + g, l2, t2, norms_end, G)
    l3 = _store_norm(norms + total * G + g, l3, t3, norms_end, G)
    c0, f0, b0, c, f = _block_of_gates(decay, beta, sums, t0, end, h, total, 0.0, 0.0, H)
    c1, f1, b1, c, f = _block_of_gates(decay, beta, sums, t1, end, h, total, c, f, H)
    c2, f2, b2, c, f = _block_of_gates(decay, beta, sums, t2, end, h, total, c, f, H)
    c3, f3, b3, c, f = _block_of_gates(decay, beta, sums, t3, end, h, total, c, f, H)
    a0 = _system(s00, l0, c0, f0, b0, l0, c0, f0, True)
    a1 = _system(s11, l1, c1, f1, b1, l1, c1, f1, True)
    a2 = _system(s22, l2, c2, f2, b2, l2, c2, f2, True)
    a3 = _system(s33, l3, c3, f3, b3, l3, c3, f3, True)
    i = tl.arange(0, 16)
    x0 = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    x1, x2, x3 = x0, x0, x0
    for j in range(15):
        x0, x1 = _without_column(a0, x0, j), _without_column(a1, x1, j)
        x2, x3 = _without_column(a2, x2, j), _without_column(a3, x3, j)
    a10, a20 = _system(s10, l1, c1, f1, b1, l0, c0, f0, False), _system(s20, l2, c2, f2, b2, l0, c0, f0, False)
    a30, a21 = _system(s30, l3, c3, f3, b3, l0, c0, f0, False), _system(s21, l2, c2, f2, b2, l1, c1, f1, False)
    a31, a32 = _system(s31, l3, c3, f3, b3, l1, c1, f1, False), _system(s32, l3, c3, f3, b3, l2, c2, f2, False)
    x10 = -_product32(x1, _product32(a10, x0))
    x21 = -_product32(x2, _product32(a21, x1))
    x32 = -_product32(x3, _product32(a32, x2))
    x20 = -_product32(x2, _product32(a20, x0) + _product32(a21, x10))
    x31 = -_product32(x3, _product32(a31, x1) + _product32(a32, x21))
    x30 = -_product32(x3, _product32(a30, x0) + _product32(a31, x10) + _product32(a32, x20))
    _store_inverse(inverse + h * 64, x0, x1, x2, x3, x10, x20, x30, x21, x31, x32, t0, end, H)


@triton.jit(do_not_specialize=["tokens", "total"])
def recur(
    key, value, beta, inverse, sums, norms, initial, states, writes, final, bounds, first_chunks, tokens, total,
    k_token, k_head, v_token, v_head, G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KP: tl.constexpr, BV: tl.constexpr, M: tl.constexpr, PACKED: tl.constexpr, HAS_STATE: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One row or document, one value head, BV columns: the state before each chunk [chunks, H, K, V], the writes w [T, H, V]
    and the state after the last token [rows, H, K, V]."""
    n, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    first, g = tl.program_id(1) * BV, h // (H // G)
    ROUND: tl.constexpr = key.dtype.element_ty
    begin, end, chunk = span_of_sequence(bounds, first_chunks, n, tokens, PACKED, M)
    state = tl.zeros([KP, BV], tl.float32)
    if HAS_STATE:
        state += load_rows(initial + (n * H + h) * K * V, 0, K, V, first, V, KP, BV)
    for c in range(0, tl.cdiv(end - begin, M)):
        t = begin + c * M
        store_rows(states + ((chunk + c) * H + h) * K * V, state, 0, K, V, first, V, KP, BV)
        k = load_rows(key + g * k_head, t, end, k_token, 0, K, M, KP)
        v = load_rows(value + h * v_head, t, end, v_token, first, V, M, BV).to(tl.float32)
        x = load_inverse(inverse, h, t, end, H, M, False)
        rate = load_column(beta + h, t, end, H, M)
        length = load_column(norms + total * G + g, t, end, G, M)
        coarse, fine, coarse_end, fine_end = load_sums(sums, h, t, end, total, H, M)
        recalled = product(k, state, ROUND, WIDEN) * (length * decay_factor(coarse + fine))[:, None]
        write = product(x, rate[:, None] * (v - recalled), ROUND, WIDEN)
        store_rows(writes + h * V, write, t, end, H * V, first, V, M, BV)
        to_end = length * decay_factor((coarse_end - coarse) + (fine_end - fine))
        added = product(tl.trans(k), to_end[:, None] * write, ROUND, WIDEN)
        state = state * decay_factor(coarse_end + fine_end) + added
    store_rows(final + (n * H + h) * K * V, state, 0, K, V, first, V, KP, BV)


@triton.jit(do_not_specialize=["tokens", "total"])
def outputs(
    query, key, sums, norms, states, writes, output, spans, tokens, total, q_token, q_head, k_token, k_head, scale,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    M: tl.constexpr, PACKED: tl.constexpr, WIDEN: tl.constexpr,
):
    """One chunk, one value head, BV columns of the output [T, H, V]."""
    chunk, h, first = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * BV
    g = h // (H // G)
    ROUND: tl.constexpr = key.dtype.element_ty
    t, end = span_of_chunk(spans, chunk, tokens, PACKED, M)
    q = load_rows(query + g * q_head, t, end, q_token, 0, K, M, KP)
    k = load_rows(key + g * k_head, t, end, k_token, 0, K, M, KP)
    q_length = load_column(norms + g, t, end, G, M) * scale
    k_length = load_column(norms + total * G + g, t, end, G, M)
    coarse, fine, _, _ = load_sums(sums, h, t, end, total, H, M)
    scores = product(q, tl.trans(k), ROUND, WIDEN) * q_length[:, None] * k_length[None, :]
    scores *= decays_between(coarse, fine, t, end, M, False)
    state = load_rows(states + (chunk * H + h) * K * V, 0, K, V, first, V, KP, BV)
    out = product(q, state, ROUND, WIDEN) * (q_length * decay_factor(coarse + fine))[:, None]
    write = load_rows(writes + h * V, t, end, H * V, first, V, M, BV)
    out += product(scores, write, ROUND, WIDEN)
    store_rows(output + h * V, out, t, end, H * V, first, V, M, BV)
