"""Triton kernels of the short causal convolution and its SiLU; `convolution.py` launches them.

A program computes BT tokens of one row and BC channels. The inputs of a token come from its row or document, and from the
state for its first W - 1 tokens. The kernels read the state, and its gradient `dafter`, as [rows or documents, W - 1, C], so
that channels are contiguous as in x; they write [..., C, W - 1]. Sums are float32. Offsets are 64 bits wide: at 8,192
channels 2^31 elements are 262,144 tokens.
"""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright reads the kernels as Python: `static_range` is not iterable there, and constexprs are not numbers.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _locate(t, row, T, lengths, document, bounds, HAS_LENGTHS: tl.constexpr, PACKED: tl.constexpr):
    """For tokens t [BT] of a row: their row or document, the position in it, its length, and whether the token exists."""
    exists = (t >= 0) & (t < T)
    owner = t * 0 + row
    position = t
    length = t * 0 + T
    if PACKED:
        owner = tl.load(document + t, mask=exists, other=0).to(tl.int64)
        start = tl.load(bounds + owner, mask=exists, other=0).to(tl.int64)
        length = tl.load(bounds + owner + 1, mask=exists, other=0).to(tl.int64) - start
        position = t - start
    if HAS_LENGTHS:
        length = t * 0 + tl.load(lengths + row).to(tl.int64)
        exists = exists & (t < length)
    return owner, position, length, exists


@triton.jit
def _input(
    x, state, t, owner, position, exists, c, in_c, back: tl.constexpr, x_start, x_token, C,
    W: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """The input `back` tokens before t, float32 [BT, BC]: from the row, else from the state, else zero."""
    inside = (exists & (position >= back))[:, None] & in_c[None, :]
    value = tl.load(x + x_start + (t - back)[:, None] * x_token + c[None, :], mask=inside, other=0.0)
    if HAS_STATE:
        before = (exists & (position < back))[:, None] & in_c[None, :]
        column = owner * (W - 1) + position + (W - 1 - back)
        old = tl.load(state + column[:, None] * C + c[None, :], mask=before, other=0.0).to(x.dtype.element_ty)
        value = tl.where(before, old, value)
    return value.to(tl.float32)


@triton.jit
def _sum(
    x, weight, state, t, owner, position, exists, c, in_c, x_start, x_token, C, W: tl.constexpr, HAS_STATE: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """sum_w weight[:, w] * input_{t - W + 1 + w}, float32 [BT, BC]."""
    total = tl.zeros([BT, BC], dtype=tl.float32)
    for w in tl.static_range(W):
        tap = tl.load(weight + c * W + w, mask=in_c, other=0.0).to(tl.float32)
        value = _input(x, state, t, owner, position, exists, c, in_c, W - 1 - w, x_start, x_token, C, W, HAS_STATE)
        total += tap[None, :] * value
    return total


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    x, weight, state, lengths, document, bounds, y, T, C, x_row, x_token,
    W: tl.constexpr, HAS_STATE: tl.constexpr, HAS_LENGTHS: tl.constexpr, PACKED: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y [B, T, C]; zero past a row's length."""
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    c = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    in_c = c < C
    owner, position, _, exists = _locate(t, row, T, lengths, document, bounds, HAS_LENGTHS, PACKED)
    total = _sum(x, weight, state, t, owner, position, exists, c, in_c, row * x_row, x_token, C, W, HAS_STATE, BT, BC)
    out = total / (1.0 + tl.exp(-total))
    at = (row * T + t)[:, None] * C + c[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=(t < T)[:, None] & in_c[None, :])


@triton.jit(do_not_specialize=["T"])
def conv_state_kernel(
    x, state, lengths, bounds, after, T, C, x_row, x_token,
    W: tl.constexpr, HAS_STATE: tl.constexpr, HAS_LENGTHS: tl.constexpr, PACKED: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """after [rows or documents, C, W - 1]: the last inputs of each; a shorter one keeps inputs of the state."""
    owner = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    in_c = c < C
    start = owner * 0
    length = start + T
    begin = owner * x_row
    if PACKED:
        start = tl.load(bounds + owner).to(tl.int64)
        length = tl.load(bounds + owner + 1).to(tl.int64) - start
        begin = owner * 0
    if HAS_LENGTHS:
        length = tl.load(lengths + owner).to(tl.int64)
    for column in tl.static_range(W - 1):
        position = length - (W - 1) + column
        value = tl.load(x + begin + (start + position) * x_token + c, mask=in_c & (position >= 0), other=0.0)
        if HAS_STATE:
            before = in_c & (position < 0)
            old = tl.load(state + (owner * (W - 1) + position + (W - 1)) * C + c, mask=before, other=0.0).to(x.dtype.element_ty)
            value = tl.where(before, old, value)
        tl.store(after + (owner * C + c) * (W - 1) + column, value.to(after.dtype.element_ty), mask=in_c)


@triton.jit
def step_kernel(x, weight, state, y, after, C, x_row, W: tl.constexpr, HAS_STATE: tl.constexpr, BC: tl.constexpr):
    """One token of each row: y [B, C], and the state [B, C, W - 1], in the caller's layout, shifted by the token."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    in_c = c < C
    new = tl.load(x + row * x_row + c, mask=in_c, other=0.0)
    total = tl.load(weight + c * W + (W - 1), mask=in_c, other=0.0).to(tl.float32) * new.to(tl.float32)
    at = (row * C + c) * (W - 1)
    for w in tl.static_range(W - 1):
        old = tl.zeros([BC], dtype=x.dtype.element_ty)
        if HAS_STATE:
            old = tl.load(state + at + w, mask=in_c, other=0.0).to(x.dtype.element_ty)
        total += tl.load(weight + c * W + w, mask=in_c, other=0.0).to(tl.float32) * old.to(tl.float32)
        if w > 0:
            tl.store(after + at + (w - 1), old, mask=in_c)
    if W > 1:
        tl.store(after + at + (W - 2), new, mask=in_c)
    tl.store(y + row * C + c, (total / (1.0 + tl.exp(-total))).to(y.dtype.element_ty), mask=in_c)


@triton.jit
def _slope(
    dy, x, weight, state, t, owner, position, exists, c, in_c, row, T, x_start, x_token, C, W: tl.constexpr,
    HAS_STATE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradient of the sum before SiLU at tokens t: dy silu'(sum), float32 [BT, BC], zero where no token exists."""
    total = _sum(x, weight, state, t, owner, position, exists, c, in_c, x_start, x_token, C, W, HAS_STATE, BT, BC)
    mask = exists[:, None] & in_c[None, :]
    grad = tl.load(dy + (row * T + t)[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
    gate = 1.0 / (1.0 + tl.exp(-total))
    return grad * gate * (1.0 + total * (1.0 - gate))


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    dy, dafter, x, weight, state, lengths, document, bounds, dx, dweight, T, C, x_row, x_token,
    W: tl.constexpr, HAS_STATE: tl.constexpr, HAS_LENGTHS: tl.constexpr, PACKED: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """dx [B, T, C] for this program's blocks of BT tokens, and their part of the weight's gradient, dweight [programs of a
    channel block, W, C]. A part for each block would be 268 MB at 32,768 tokens and 8,192 channels.

    An input contributes to its own token and the W - 1 after it. Their slopes are recomputed rather than stored: the inputs
    of a block are in the first-level cache, a float32 copy of all slopes would not be.
    """
    row = tl.program_id(2).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    in_c = c < C
    start = row * x_row
    taps = tl.arange(0, BW)[:, None]
    parts = tl.zeros([BW, BC], dtype=tl.float32)
    block = tl.program_id(0)
    while block < tl.cdiv(T, BT):  # the interpreter takes a constexpr only as the end of `range`
        t = block.to(tl.int64) * BT + tl.arange(0, BT)
        owner, position, length, exists = _locate(t, row, T, lengths, document, bounds, HAS_LENGTHS, PACKED)
        slope = _slope(
            dy, x, weight, state, t, owner, position, exists, c, in_c, row, T, start, x_token, C, W, HAS_STATE, BT, BC
        )
        tap = tl.load(weight + c * W + (W - 1), mask=in_c, other=0.0).to(tl.float32)
        grad = slope * tap[None, :]
        for w in tl.static_range(W):
            value = _input(x, state, t, owner, position, exists, c, in_c, W - 1 - w, start, x_token, C, W, HAS_STATE)
            parts += tl.where(taps == w, tl.sum(slope * value, axis=0)[None, :], 0.0)
        for ahead in tl.static_range(1, W):
            later = t + ahead
            owner2, position2, _, exists2 = _locate(later, row, T, lengths, document, bounds, HAS_LENGTHS, PACKED)
            reached = exists2 & (position2 >= ahead)  # else the token is in the next document
            slope = _slope(
                dy, x, weight, state, later, owner2, position2, reached, c, in_c, row, T, start, x_token, C, W, HAS_STATE,
                BT, BC,
            )  # fmt: skip
            tap = tl.load(weight + c * W + (W - 1 - ahead), mask=in_c, other=0.0).to(tl.float32)
            grad += slope * tap[None, :]
        if W > 1:  # the new conv_state is an output too
            column = position - (length - (W - 1))
            kept = (exists & (column >= 0))[:, None] & in_c[None, :]
            at = (owner * (W - 1) + column)[:, None] * C + c[None, :]
            grad += tl.load(dafter + at, mask=kept, other=0.0).to(tl.float32)
        at = (row * T + t)[:, None] * C + c[None, :]
        tl.store(dx + at, grad.to(dx.dtype.element_ty), mask=(t < T)[:, None] & in_c[None, :])
        block += tl.num_programs(0)
    part = (row * tl.num_programs(0) + tl.program_id(0)) * W
    tl.store(dweight + (part + taps) * C + c[None, :], parts, mask=(taps < W) & in_c[None, :])


@triton.jit(do_not_specialize=["T"])
def state_gradient_kernel(
    dy, dafter, x, weight, state, lengths, document, bounds, dstate, T, C, x_row, x_token,
    W: tl.constexpr, HAS_LENGTHS: tl.constexpr, PACKED: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dstate [rows or documents, C, W - 1]: column s contributes to tokens 0 ... s, and to column s - length of the new
    state if that exists."""
    owner = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    in_c = c < C
    row = owner
    first = owner * 0
    length = first + T
    if PACKED:
        row = owner * 0
        first = tl.load(bounds + owner).to(tl.int64)
        length = tl.load(bounds + owner + 1).to(tl.int64) - first
    if HAS_LENGTHS:
        length = tl.load(lengths + owner).to(tl.int64)
    for column in tl.static_range(W - 1):
        grad = tl.zeros([1, BC], dtype=tl.float32)
        for step in tl.static_range(column + 1):
            position = tl.arange(0, 1).to(tl.int64) + step
            slope = _slope(
                dy, x, weight, state, first + position, owner + position * 0, position, position < length, c, in_c, row, T,
                row * x_row, x_token, C, W, True, 1, BC,
            )  # fmt: skip
            tap = tl.load(weight + c * W + (column - step), mask=in_c, other=0.0).to(tl.float32)
            grad += slope * tap[None, :]
        kept = in_c & (column >= length)
        at = (owner * (W - 1) + column - length) * C + c
        grad += tl.load(dafter + at, mask=kept, other=0.0).to(tl.float32)[None, :]
        at = (owner * C + c) * (W - 1)
        tl.store(dstate + at[None, :] + column, grad.to(dstate.dtype.element_ty), mask=in_c[None, :])
