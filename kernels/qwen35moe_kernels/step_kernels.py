"""The Triton kernel of one token of Gated DeltaNet; `step.py` launches it."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright reads the kernels as Python: `static_range` is not iterable there, and constexprs are not numbers.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _convolved(
    qkv, conv_state, weight, after, row, channel, in_c, C, W: tl.constexpr, BC: tl.constexpr, write: tl.constexpr
):  # fmt: skip
    """silu of the convolution at channels [BC], float32. If `write`, stores their conv_state after the token."""
    new = tl.load(qkv + row * C + channel, mask=in_c, other=0.0)
    total = tl.load(weight + channel * W + (W - 1), mask=in_c, other=0.0).to(tl.float32) * new.to(tl.float32)
    at = (row * C + channel) * (W - 1)
    for w in tl.static_range(W - 1):
        old = tl.load(conv_state + at + w, mask=in_c, other=0.0).to(qkv.dtype.element_ty)
        total += tl.load(weight + channel * W + w, mask=in_c, other=0.0).to(tl.float32) * old.to(tl.float32)
        if w > 0:
            tl.store(after + at + (w - 1), old, mask=in_c & write)
    if W > 1:
        tl.store(after + at + (W - 2), new, mask=in_c & write)
    return total / (1.0 + tl.exp(-total))


@triton.jit
def _softplus(x):
    """log(1 + e^x). For small u, log(1 + u) loses digits of u; the factor u / ((1 + u) - 1) restores them (Kahan)."""
    u = tl.exp(-tl.abs(x))
    rounded = 1.0 + u
    exact = tl.where(rounded == 1.0, u, tl.log(rounded) * (u / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))
    return tl.maximum(x, 0.0) + exact


@triton.jit
def step_kernel(
    qkv, gate, a, b, conv_state, recurrent_state, conv_weight, A_log, dt_bias, norm_weight, y, conv_state_after,
    recurrent_state_after, active, eps, G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, WHOLE: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """One row, one value head and BV columns of its recurrent state [K, V], which are read and written once. Every program
    that uses a key or query repeats its convolution.

    WHOLE (BV spans V): y is the normed output. Otherwise y is the rule's output in float32, and the norm is another launch.
    IN_PLACE: recurrent_state_after is recurrent_state, written in rows where `active` is not 0. No other program reads the part
    that this one writes.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    repeats: tl.constexpr = H // G
    C: tl.constexpr = 2 * G * K + H * V
    group = head // repeats
    k_index = tl.arange(0, BK)
    v_index = tl.program_id(2) * BV + tl.arange(0, BV)
    in_k = k_index < K
    in_v = v_index < V
    first = (head % repeats == 0) & (tl.program_id(2) == 0)  # of the programs that share a key, one stores its conv_state

    query = _convolved(qkv, conv_state, conv_weight, conv_state_after, row, group * K + k_index, in_k, C, W, BK, first)
    key = _convolved(qkv, conv_state, conv_weight, conv_state_after, row, (G + group) * K + k_index, in_k, C, W, BK, first)
    v_channel = 2 * G * K + head * V + v_index
    value = _convolved(qkv, conv_state, conv_weight, conv_state_after, row, v_channel, in_v, C, W, BV, True)
    query = query / tl.sqrt(tl.sum(query * query, axis=0) + 1e-6) * (1.0 / K**0.5)
    key = key / tl.sqrt(tl.sum(key * key, axis=0) + 1e-6)

    row_head = row * H + head
    raised = tl.load(a + row_head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    decay = -tl.exp(tl.load(A_log + head).to(tl.float32)) * _softplus(raised)
    beta = 1.0 / (1.0 + tl.exp(-tl.load(b + row_head).to(tl.float32)))

    at = (row_head * K + k_index)[:, None] * V + v_index[None, :]
    mask = in_k[:, None] & in_v[None, :]
    state = tl.load(recurrent_state + at, mask=mask, other=0.0) * tl.exp(decay)
    write = beta * (value - tl.sum(key[:, None] * state, axis=0))
    state += key[:, None] * write[None, :]
    if IN_PLACE:
        mask = mask & (tl.load(active + row) != 0)
    tl.store(recurrent_state_after + at, state, mask=mask)

    core = tl.sum(query[:, None] * state, axis=0)
    if WHOLE:
        z = tl.load(gate + row_head * V + v_index, mask=in_v, other=0.0).to(tl.float32)
        w = tl.load(norm_weight + v_index, mask=in_v, other=0.0).to(tl.float32)
        core = core / tl.sqrt(tl.sum(core * core, axis=0) / V + eps) * w * z / (1.0 + tl.exp(-z))
    tl.store(y + row_head * V + v_index, core.to(y.dtype.element_ty), mask=in_v)
