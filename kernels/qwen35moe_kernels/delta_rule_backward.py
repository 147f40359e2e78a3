"""The gated delta rule backward, from its inputs, X, W and the memories before each chunk: four kernels.

With the letters of delta_rule_forward.py, P = Q K^T * D, dO and dS' given, and G the gradient of beta (V - exp(c) K S):

    dW  = P^T dO / sqrt(K) + exp(c_C - c) K dS'        G = X^T dW        A's gradient: -G W^T below the diagonal
    dS  = exp(c_C) dS' + (exp(c) Q)^T dO / sqrt(K) - (exp(c) K)^T beta G

`attend_back` computes P^T dO of every chunk, `recur_back` takes dS' through the chunks from the last to the first, and
`queries_back` and `keys_back` the rest of every chunk: the gradients of q, k (summed over the value heads of a key head,
and through the normalisation), v, beta and the decay. In one kernel they spill more than
in two.

The gate at l sits in every D_ij with j < l <= i, in exp(c_i) for i >= l and in exp(c_C - c_j) for j < l. Its gradient is
the sum of just these, none of them a difference: behind a hard gate, where all of them are small, a difference of sums
would be rounding errors of what lies outside.

No product takes the transpose of a tile that was computed here; where one is needed it is computed transposed as well.
Triton 3.4 to 3.7.0 gets just that wrong on Hopper GPUs (flash-linear-attention issue 640, pull request 826).
"""

# pyright: reportInvalidTypeForm=false, reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from qwen35moe_kernels.delta_rule_tiles import (
    decays_between,
    forgetting,
    load_column,
    load_inverse,
    load_rows,
    load_sums,
    product,
    span_of_chunk,
    span_of_sequence,
    store_column,
    store_rows,
)


@triton.jit
def attend_back(
    query, key, sums, norms, d_output, d_writes, spans, tokens, total, q_token, q_head, k_token, k_head, scale,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, PACKED: tl.constexpr, WIDEN: tl.constexpr,
):
    """P^T dO / sqrt(K) [T, H, V] of one chunk, one value head, BV columns."""
    chunk, h, first = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * BV
    g = h // (H // G)
    ROUND: tl.constexpr = key.dtype.element_ty
    t, end = span_of_chunk(spans, chunk, tokens, PACKED, C)
    q = load_rows(query + g * q_head, t, end, q_token, 0, K, C, KP)
    k = load_rows(key + g * k_head, t, end, k_token, 0, K, C, KP)
    q_length = load_column(norms + g, t, end, G, C) * scale
    k_length = load_column(norms + total * G + g, t, end, G, C)
    coarse, fine, _, _ = load_sums(sums, h, t, end, total, H, C)
    attend = product(k, tl.trans(q), ROUND, WIDEN) * k_length[:, None] * q_length[None, :]
    attend *= decays_between(coarse, fine, t, end, C, True)
    d_out = load_rows(d_output + h * V, t, end, H * V, first, V, C, BV)
    store_rows(d_writes + h * V, product(attend, d_out, ROUND, WIDEN), t, end, H * V, first, V, C, BV)


@triton.jit
def recur_back(
    query, key, beta, inverse, sums, norms, d_output, d_writes, d_final, d_states, d_initial, bounds, first_chunks,
    tokens, total, q_token, q_head, k_token, k_head, scale, G: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr, WIDEN: tl.constexpr,
):
    """One row or document, one value head, BV columns: dS after each chunk [chunks, H, K, V] and before the first; G
    [T, H, V], written over the P^T dO that it is computed from."""
    n, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    first, g = tl.program_id(1) * BV, h // (H // G)
    ROUND: tl.constexpr = key.dtype.element_ty
    begin, end, chunk = span_of_sequence(bounds, first_chunks, n, tokens, PACKED, C)
    d_memory = load_rows(d_final + (n * H + h) * K * V, 0, K, V, first, V, KP, BV)
    chunks = tl.cdiv(end - begin, C)
    for back in range(0, chunks):
        c = chunks - 1 - back
        t = begin + c * C
        store_rows(d_states + ((chunk + c) * H + h) * K * V, d_memory, 0, K, V, first, V, KP, BV)
        q = load_rows(query + g * q_head, t, end, q_token, 0, K, C, KP)
        k = load_rows(key + g * k_head, t, end, k_token, 0, K, C, KP)
        d_out = load_rows(d_output + h * V, t, end, H * V, first, V, C, BV).to(tl.float32)
        d_write = load_rows(d_writes + h * V, t, end, H * V, first, V, C, BV).to(tl.float32)
        x = load_inverse(inverse, h, t, end, H, C, True)
        rate = load_column(beta + h, t, end, H, C)
        q_length = load_column(norms + g, t, end, G, C) * scale
        k_length = load_column(norms + total * G + g, t, end, G, C)
        coarse, fine, coarse_end, fine_end = load_sums(sums, h, t, end, total, H, C)
        since_start = forgetting(coarse + fine)
        to_end = forgetting((coarse_end - coarse) + (fine_end - fine))
        d_write += product(k, d_memory, ROUND, WIDEN) * (k_length * to_end)[:, None]
        d_wanted = product(x, d_write, ROUND, WIDEN)
        store_rows(d_writes + h * V, d_wanted, t, end, H * V, first, V, C, BV)
        d_memory *= forgetting(coarse_end + fine_end)
        d_memory += product(tl.trans(q), (q_length * since_start)[:, None] * d_out, ROUND, WIDEN)
        d_memory -= product(tl.trans(k), (k_length * since_start * rate)[:, None] * d_wanted, ROUND, WIDEN)
    store_rows(d_initial + (n * H + h) * K * V, d_memory, 0, K, V, first, V, KP, BV)


@triton.jit
def _through_length(gradient, x, length):
    """The gradient of x, given that of x length with length = 1 / sqrt(sum x^2 + 1e-6)."""
    unit = x.to(tl.float32) * length[:, None]
    return length[:, None] * (gradient - unit * tl.sum(unit * gradient, axis=1)[:, None])


@triton.jit
def queries_back(
    query, key, sums, norms, states, writes, d_output, d_query, d_units, d_decay, spans, tokens, total,
    q_token, q_head, k_token, k_head, scale, G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr, WIDEN: tl.constexpr,
):
    """What the answers O = (exp(c) Q S + P W) / sqrt(K) give to q, to the unit keys and to the decay: one chunk of one key
    head, its value heads one after another."""
    chunk, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ROUND: tl.constexpr = key.dtype.element_ty
    t, end = span_of_chunk(spans, chunk, tokens, PACKED, C)
    below = tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :]
    q = load_rows(query + g * q_head, t, end, q_token, 0, K, C, KP)
    k = load_rows(key + g * k_head, t, end, k_token, 0, K, C, KP)
    q_length = load_column(norms + g, t, end, G, C)
    k_length = load_column(norms + total * G + g, t, end, G, C)
    d_q, d_k = tl.zeros([C, KP], tl.float32), tl.zeros([C, KP], tl.float32)
    for each in range(H // G):
        h = g * (H // G) + each
        coarse, fine, _, _ = load_sums(sums, h, t, end, total, H, C)
        since_start = scale * forgetting(coarse + fine)
        d_attend, d_attend_t = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
        d_start = tl.zeros([C], tl.float32)
        for first in range(0, V, BV):
            d_out = load_rows(d_output + h * V, t, end, H * V, first, V, C, BV)
            write = load_rows(writes + h * V, t, end, H * V, first, V, C, BV)
            memory = load_rows(states + (chunk * H + h) * K * V, 0, K, V, first, V, KP, BV)
            d_attend += product(d_out, tl.trans(write), ROUND, WIDEN)
            d_attend_t += product(write, tl.trans(d_out), ROUND, WIDEN)
            d_out = d_out.to(tl.float32) * since_start[:, None]
            d_q += product(d_out, tl.trans(memory), ROUND, WIDEN)
            d_start += tl.sum(d_out * product(q, memory, ROUND, WIDEN), axis=1)
        d_attend_t *= decays_between(coarse, fine, t, end, C, True)
        d_k += product(d_attend_t * (scale * q_length)[None, :], q, ROUND, WIDEN)
        d_attend *= scale * decays_between(coarse, fine, t, end, C, False) * k_length[None, :]
        d_q += product(d_attend, k, ROUND, WIDEN)
        d_logs = tl.where(below, d_attend * product(q, tl.trans(k), ROUND, WIDEN) * q_length[:, None], 0.0)
        gate = tl.cumsum(q_length * d_start, axis=0, reverse=True)
        gate += tl.sum(tl.where(below, tl.cumsum(d_logs, axis=0, reverse=True), 0.0), axis=1)  # [l, j]: all i >= l
        store_column(d_decay + h, gate, t, end, H, C)
    store_rows(d_query + g * K, _through_length(d_q, q, q_length), t, end, G * K, 0, K, C, KP)
    store_rows(d_units + g * K, d_k, t, end, G * K, 0, K, C, KP)


@triton.jit
def keys_back(
    key, value, beta, sums, norms, states, writes, d_writes, d_states, d_units, d_key, d_value, d_decay, d_beta, spans,
    tokens, total, k_token, k_head, v_token, v_head, G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr, WIDEN: tl.constexpr,
):
    """What the corrections (I + A) W = beta (V - exp(c) K S) and what they bring, S' = exp(c_C) S + (exp(c_C - c) K)^T W,
    give to k, v, beta and the decay, added to what the answers gave: the same programs."""
    chunk, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ROUND: tl.constexpr = key.dtype.element_ty
    t, end = span_of_chunk(spans, chunk, tokens, PACKED, C)
    below = tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :]
    above = tl.arange(0, C)[:, None] < tl.arange(0, C)[None, :]
    k = load_rows(key + g * k_head, t, end, k_token, 0, K, C, KP)
    k_length = load_column(norms + total * G + g, t, end, G, C)
    d_k = load_rows(d_units + g * K, t, end, G * K, 0, K, C, KP)
    for each in range(H // G):
        h = g * (H // G) + each
        state_at = (chunk * H + h) * K * V
        rate = load_column(beta + h, t, end, H, C)
        coarse, fine, coarse_end, fine_end = load_sums(sums, h, t, end, total, H, C)
        since_start, kept = forgetting(coarse + fine), forgetting(coarse_end + fine_end)
        to_end = forgetting((coarse_end - coarse) + (fine_end - fine))
        d_system, d_system_t = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
        d_rate, recalled = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
        d_end, d_kept = tl.zeros([C], tl.float32), 0.0
        for first in range(0, V, BV):
            write = load_rows(writes + h * V, t, end, H * V, first, V, C, BV)
            d_wanted = load_rows(d_writes + h * V, t, end, H * V, first, V, C, BV)
            d_system -= product(d_wanted, tl.trans(write), ROUND, WIDEN)
            d_system_t -= product(write, tl.trans(d_wanted), ROUND, WIDEN)
            d_wanted = d_wanted.to(tl.float32)
            v = load_rows(value + h * v_head, t, end, v_token, first, V, C, BV).to(tl.float32)
            d_rate += tl.sum(d_wanted * v, axis=1)
            store_rows(d_value + h * V, rate[:, None] * d_wanted, t, end, H * V, first, V, C, BV)
            memory = load_rows(states + state_at, 0, K, V, first, V, KP, BV)
            d_wanted *= since_start[:, None]
            recalled += tl.sum(d_wanted * product(k, memory, ROUND, WIDEN), axis=1)
            d_k -= product(rate[:, None] * d_wanted, tl.trans(memory), ROUND, WIDEN)
            d_memory = load_rows(d_states + state_at, 0, K, V, first, V, KP, BV)
            d_kept += tl.sum(tl.sum(memory.to(tl.float32) * d_memory.to(tl.float32), axis=1), axis=0)
            brought = write.to(tl.float32) * to_end[:, None]
            d_k += product(brought, tl.trans(d_memory), ROUND, WIDEN)
            d_end += tl.sum(brought * product(k, d_memory, ROUND, WIDEN), axis=1)
        recalled *= k_length
        d_system = tl.where(below, d_system * decays_between(coarse, fine, t, end, C, False), 0.0)
        d_system_t = tl.where(above, d_system_t * decays_between(coarse, fine, t, end, C, True), 0.0)
        d_both = (rate[:, None] * d_system + rate[None, :] * d_system_t) * k_length[None, :]
        d_k += product(d_both, k, ROUND, WIDEN)
        d_system *= product(k, tl.trans(k), ROUND, WIDEN) * k_length[:, None] * k_length[None, :]
        store_column(d_beta + h, d_rate + tl.sum(d_system, axis=1) - recalled, t, end, H, C)
        # [l, j]: of all A_ij with i >= l, and of what j < l brings to the end.
        across = tl.cumsum(rate[:, None] * d_system, axis=0, reverse=True) + (k_length * d_end)[None, :]
        gate = load_column(d_decay + h, t, end, H, C) - tl.cumsum(rate * recalled, axis=0, reverse=True)
        gate += kept * d_kept + tl.sum(tl.where(below, across, 0.0), axis=1)
        store_column(d_decay + h, gate, t, end, H, C)
    store_rows(d_key + g * K, _through_length(d_k, k, k_length), t, end, G * K, 0, K, C, KP)
