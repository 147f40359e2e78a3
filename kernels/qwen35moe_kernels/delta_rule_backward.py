"""The gated delta rule backward, from its inputs, x, the writes w and the state before each chunk: four kernels.

With the letters of delta_rule_forward.py, p_ij = d_ij (q_i . k_j) / sqrt(K), and the gradients written with a leading d, those
of the outputs, do_i, and of the state after the chunk, dS_M, given:

    dw_j = sum_i p_ij do_i + d_Mj dS_M^T k_j        ddelta_j = sum_i x_ij dw_i        da_ij = -ddelta_i . w_j for j < i
    dS_0 = d_M0 dS_M + sum_i d_i0 (q_i (x) do_i / sqrt(K) - k_i (x) beta_i ddelta_i)

`attend_back` computes sum_i p_ij do_i of every chunk, `recur_back` passes dS through the chunks from the last to the first, and
`queries_back` and `keys_back` compute the gradients of every chunk: of q and k (summed over the value heads of a key head, and
through the normalisation), v, beta and the decay. One kernel in place of these two would spill more registers.

The log decay of token l is a term of d_ij for j < l <= i, of d_i0 for i >= l and of d_Mj for j < l. Its gradient is summed over
these alone. A difference of larger sums would consist of rounding errors behind a strong decay, where all terms are small.

No product takes the transpose of a tile computed in the same kernel; such a tile is computed a second time, transposed. Triton
3.4 to 3.7.0 compiles these products wrongly for Hopper GPUs (flash-linear-attention issue 640, pull request 826).
"""

# pyright: reportInvalidTypeForm=false, reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from qwen35moe_kernels.delta_rule_tiles import (
    decay_factor,
    decays_between,
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


@triton.jit(do_not_specialize=["tokens", "total"])
def attend_back(
    query, key, sums, norms, d_output, d_writes, spans, tokens, total, q_token, q_head, k_token, k_head, scale,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr,
    M: tl.constexpr, PACKED: tl.constexpr, WIDEN: tl.constexpr,
):
    """sum_i p_ij do_i [T, H, V] of one chunk, one value head, BV columns."""
    chunk, h, first = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * BV
    g = h // (H // G)
    ROUND: tl.constexpr = key.dtype.element_ty
    t, end = span_of_chunk(spans, chunk, tokens, PACKED, M)
    q = load_rows(query + g * q_head, t, end, q_token, 0, K, M, KP)
    k = load_rows(key + g * k_head, t, end, k_token, 0, K, M, KP)
    q_length = load_column(norms + g, t, end, G, M) * scale
    k_length = load_column(norms + total * G + g, t, end, G, M)
    coarse, fine, _, _ = load_sums(sums, h, t, end, total, H, M)
    scores = product(k, tl.trans(q), ROUND, WIDEN) * k_length[:, None] * q_length[None, :]
    scores *= decays_between(coarse, fine, t, end, M, True)
    d_out = load_rows(d_output + h * V, t, end, H * V, first, V, M, BV)
    store_rows(d_writes + h * V, product(scores, d_out, ROUND, WIDEN), t, end, H * V, first, V, M, BV)


@triton.jit(do_not_specialize=["tokens", "total"])
def recur_back(
    query, key, beta, inverse, sums, norms, d_output, d_writes, d_final, d_states, d_initial, bounds, first_chunks,
    tokens, total, q_token, q_head, k_token, k_head, scale, G: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, M: tl.constexpr, PACKED: tl.constexpr, WIDEN: tl.constexpr,
):
    """One row or document, one value head, BV columns: dS after each chunk [chunks, H, K, V] and before the first; ddelta
    [T, H, V], written over sum_i p_ij do_i."""
    n, h = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H
    first, g = tl.program_id(1) * BV, h // (H // G)
    ROUND: tl.constexpr = key.dtype.element_ty
    begin, end, chunk = span_of_sequence(bounds, first_chunks, n, tokens, PACKED, M)
    d_state = load_rows(d_final + (n * H + h) * K * V, 0, K, V, first, V, KP, BV)
    chunks = tl.cdiv(end - begin, M)
    for back in range(0, chunks):
        c = chunks - 1 - back
        t = begin + c * M
        store_rows(d_states + ((chunk + c) * H + h) * K * V, d_state, 0, K, V, first, V, KP, BV)
        q = load_rows(query + g * q_head, t, end, q_token, 0, K, M, KP)
        k = load_rows(key + g * k_head, t, end, k_token, 0, K, M, KP)
        d_out = load_rows(d_output + h * V, t, end, H * V, first, V, M, BV).to(tl.float32)
        d_write = load_rows(d_writes + h * V, t, end, H * V, first, V, M, BV).to(tl.float32)
        x = load_inverse(inverse, h, t, end, H, M, True)
        rate = load_column(beta + h, t, end, H, M)
        q_length = load_column(norms + g, t, end, G, M) * scale
        k_length = load_column(norms + total * G + g, t, end, G, M)
        coarse, fine, coarse_end, fine_end = load_sums(sums, h, t, end, total, H, M)
        since_start = decay_factor(coarse + fine)
        to_end = decay_factor((coarse_end - coarse) + (fine_end - fine))
        d_write += product(k, d_state, ROUND, WIDEN) * (k_length * to_end)[:, None]
        d_delta = product(x, d_write, ROUND, WIDEN)
        store_rows(d_writes + h * V, d_delta, t, end, H * V, first, V, M, BV)
        d_state *= decay_factor(coarse_end + fine_end)
        d_state += product(tl.trans(q), (q_length * since_start)[:, None] * d_out, ROUND, WIDEN)
        d_state -= product(tl.trans(k), (k_length * since_start * rate)[:, None] * d_delta, ROUND, WIDEN)
    store_rows(d_initial + (n * H + h) * K * V, d_state, 0, K, V, first, V, KP, BV)


@triton.jit
def _through_length(gradient, x, length):
    """The gradient of x from that of x length, length = 1 / sqrt(sum x^2 + 1e-6)."""
    unit = x.to(tl.float32) * length[:, None]
    return length[:, None] * (gradient - unit * tl.sum(unit * gradient, axis=1)[:, None])


@triton.jit(do_not_specialize=["tokens", "total"])
def queries_back(
    query, key, sums, norms, states, writes, d_output, d_query, d_units, d_decay, spans, tokens, total,
    q_token, q_head, k_token, k_head, scale, G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KP: tl.constexpr, BV: tl.constexpr, M: tl.constexpr, PACKED: tl.constexpr, WIDEN: tl.constexpr,
):
    """Gradients through the outputs o_i = d_i0 S_0^T q_i / sqrt(K) + sum_j p_ij w_j: of q, of the unit keys and of the decay.
    One chunk of one key head; its value heads one after another."""
    chunk, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ROUND: tl.constexpr = key.dtype.element_ty
    t, end = span_of_chunk(spans, chunk, tokens, PACKED, M)
    below = tl.arange(0, M)[:, None] > tl.arange(0, M)[None, :]
    q_length = load_column(norms + g, t, end, G, M)
    k_length = load_column(norms + total * G + g, t, end, G, M)
    d_q, d_k = tl.zeros([M, KP], tl.float32), tl.zeros([M, KP], tl.float32)
    for head in range(H // G):
        h = g * (H // G) + head
        coarse, fine, _, _ = load_sums(sums, h, t, end, total, H, M)
        d_scores, d_scores_t = tl.zeros([M, M], tl.float32), tl.zeros([M, M], tl.float32)
        d_start = tl.zeros([M, KP], tl.float32)
        for first in range(0, V, BV):
            d_out = load_rows(d_output + h * V, t, end, H * V, first, V, M, BV)
            write = load_rows(writes + h * V, t, end, H * V, first, V, M, BV)
            state = load_rows(states + (chunk * H + h) * K * V, 0, K, V, first, V, KP, BV)
            d_scores += product(d_out, tl.trans(write), ROUND, WIDEN)
            d_scores_t += product(write, tl.trans(d_out), ROUND, WIDEN)
            d_start += product(d_out, tl.trans(state), ROUND, WIDEN)
        q = load_rows(query + g * q_head, t, end, q_token, 0, K, M, KP)
        k = load_rows(key + g * k_head, t, end, k_token, 0, K, M, KP)
        d_start *= (scale * decay_factor(coarse + fine))[:, None]
        d_q += d_start
        gate = tl.cumsum(q_length * tl.sum(q.to(tl.float32) * d_start, axis=1), axis=0, reverse=True)
        d_scores_t *= decays_between(coarse, fine, t, end, M, True)
        d_k += product(d_scores_t * (scale * q_length)[None, :], q, ROUND, WIDEN)
        d_scores *= scale * decays_between(coarse, fine, t, end, M, False) * k_length[None, :]
        d_q += product(d_scores, k, ROUND, WIDEN)
        d_logs = tl.where(below, d_scores * product(q, tl.trans(k), ROUND, WIDEN) * q_length[:, None], 0.0)
        gate += tl.sum(tl.where(below, tl.cumsum(d_logs, axis=0, reverse=True), 0.0), axis=1)  # [l, j]: all i >= l
        store_column(d_decay + h, gate, t, end, H, M)
    q = load_rows(query + g * q_head, t, end, q_token, 0, K, M, KP)
    store_rows(d_query + g * K, _through_length(d_q, q, q_length), t, end, G * K, 0, K, M, KP)
    store_rows(d_units + g * K, d_k, t, end, G * K, 0, K, M, KP)


@triton.jit(do_not_specialize=["tokens", "total"])
def keys_back(
    key, value, beta, sums, norms, states, writes, d_writes, d_states, d_units, d_key, d_value, d_decay, d_beta, spans,
    tokens, total, k_token, k_head, v_token, v_head, G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    KP: tl.constexpr, BV: tl.constexpr, M: tl.constexpr, PACKED: tl.constexpr, WIDEN: tl.constexpr,
):
    """Gradients through the writes, (I + a) w = delta, and the state, S_M = d_M0 S_0 + sum_j d_Mj k_j (x) w_j: of k, v, beta
    and the decay, those of k and the decay added to the results of `queries_back`. The same programs as there."""
    chunk, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ROUND: tl.constexpr = key.dtype.element_ty
    t, end = span_of_chunk(spans, chunk, tokens, PACKED, M)
    below = tl.arange(0, M)[:, None] > tl.arange(0, M)[None, :]
    above = tl.arange(0, M)[:, None] < tl.arange(0, M)[None, :]
    k_length = load_column(norms + total * G + g, t, end, G, M)
    d_k = load_rows(d_units + g * K, t, end, G * K, 0, K, M, KP)
    for head in range(H // G):
        h = g * (H // G) + head
        state_at = (chunk * H + h) * K * V
        rate = load_column(beta + h, t, end, H, M)
        coarse, fine, coarse_end, fine_end = load_sums(sums, h, t, end, total, H, M)
        since_start, chunk_decay = decay_factor(coarse + fine), decay_factor(coarse_end + fine_end)
        to_end = decay_factor((coarse_end - coarse) + (fine_end - fine))
        d_system, d_system_t = tl.zeros([M, M], tl.float32), tl.zeros([M, M], tl.float32)
        recall, add = tl.zeros([M, KP], tl.float32), tl.zeros([M, KP], tl.float32)
        d_rate, d_chunk_decay = tl.zeros([M], tl.float32), 0.0
        for first in range(0, V, BV):
            write = load_rows(writes + h * V, t, end, H * V, first, V, M, BV)
            d_delta = load_rows(d_writes + h * V, t, end, H * V, first, V, M, BV)
            d_system -= product(d_delta, tl.trans(write), ROUND, WIDEN)
            d_system_t -= product(write, tl.trans(d_delta), ROUND, WIDEN)
            d_delta = d_delta.to(tl.float32)
            v = load_rows(value + h * v_head, t, end, v_token, first, V, M, BV).to(tl.float32)
            d_rate += tl.sum(d_delta * v, axis=1)
            store_rows(d_value + h * V, rate[:, None] * d_delta, t, end, H * V, first, V, M, BV)
            state = load_rows(states + state_at, 0, K, V, first, V, KP, BV)
            recall += product(d_delta, tl.trans(state), ROUND, WIDEN)
            d_state = load_rows(d_states + state_at, 0, K, V, first, V, KP, BV)
            d_chunk_decay += tl.sum(tl.sum(state.to(tl.float32) * d_state.to(tl.float32), axis=1), axis=0)
            add += product(write, tl.trans(d_state), ROUND, WIDEN)
        k = load_rows(key + g * k_head, t, end, k_token, 0, K, M, KP)
        recalled = since_start * k_length * tl.sum(recall * k.to(tl.float32), axis=1)
        d_end = to_end * tl.sum(add * k.to(tl.float32), axis=1)
        d_k += to_end[:, None] * add - (rate * since_start)[:, None] * recall
        d_system = tl.where(below, d_system * decays_between(coarse, fine, t, end, M, False), 0.0)
        d_system_t = tl.where(above, d_system_t * decays_between(coarse, fine, t, end, M, True), 0.0)
        d_both = (rate[:, None] * d_system + rate[None, :] * d_system_t) * k_length[None, :]
        d_k += product(d_both, k, ROUND, WIDEN)
        d_system *= product(k, tl.trans(k), ROUND, WIDEN) * k_length[:, None] * k_length[None, :]
        store_column(d_beta + h, d_rate + tl.sum(d_system, axis=1) - recalled, t, end, H, M)
        # [l, j]: the terms of a_ij for all i >= l, and of d_Mj.
        across = tl.cumsum(rate[:, None] * d_system, axis=0, reverse=True) + (k_length * d_end)[None, :]
        gate = load_column(d_decay + h, t, end, H, M) - tl.cumsum(rate * recalled, axis=0, reverse=True)
        gate += chunk_decay * d_chunk_decay + tl.sum(tl.where(below, across, 0.0), axis=1)
        store_column(d_decay + h, gate, t, end, H, M)
    k = load_rows(key + g * k_head, t, end, k_token, 0, K, M, KP)
    store_rows(d_key + g * K, _through_length(d_k, k, k_length), t, end, G * K, 0, K, M, KP)
