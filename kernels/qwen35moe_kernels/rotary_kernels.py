"""The Triton kernel of the rotary embedding; `rotary.py` launches it."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _norm_rotate(x, y, weight, at, out, token, cos, sin, K, HALF, eps, BK: tl.constexpr, BHALF: tl.constexpr):
    """One head [K] at x + at, normalised, its first 2 HALF entries rotated, written to y + out."""
    column = tl.arange(0, BK)
    in_k = column < K
    wide = tl.load(x + at + column, mask=in_k, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=0) / K + eps)
    w = tl.load(weight + column, mask=in_k, other=0.0).to(tl.float32)
    rest = in_k & (column >= 2 * HALF)
    tl.store(y + out + column, (wide * scale * (1.0 + w)).to(y.dtype.element_ty), mask=rest)
    j = tl.arange(0, BHALF)
    in_half = j < HALF
    c = tl.load(cos + token * HALF + j, mask=in_half, other=0.0).to(tl.float32)
    s = tl.load(sin + token * HALF + j, mask=in_half, other=0.0).to(tl.float32)
    first = tl.load(x + at + j, mask=in_half, other=0.0).to(tl.float32) * scale
    first *= 1.0 + tl.load(weight + j, mask=in_half, other=0.0).to(tl.float32)
    second = tl.load(x + at + HALF + j, mask=in_half, other=0.0).to(tl.float32) * scale
    second *= 1.0 + tl.load(weight + HALF + j, mask=in_half, other=0.0).to(tl.float32)
    tl.store(y + out + j, (first * c - second * s).to(y.dtype.element_ty), mask=in_half)
    tl.store(y + out + HALF + j, (second * c + first * s).to(y.dtype.element_ty), mask=in_half)


@triton.jit(do_not_specialize=["T"])
def norm_rotary_kernel(
    query, key, cos, sin, query_weight, key_weight, query_after, key_after, T, H, G, K, HALF, eps,
    query_row, query_token, query_head, key_row, key_token, key_head, BK: tl.constexpr, BHALF: tl.constexpr,
):  # fmt: skip
    """One head of one token, normalised and rotated; the programs are those of `rotary_kernel`."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    b, t = token // T, token % T
    if head < H:
        at = b * query_row + t * query_token + head * query_head
        out = (token * H + head) * K
        _norm_rotate(query, query_after, query_weight, at, out, token, cos, sin, K, HALF, eps, BK, BHALF)
    else:
        at = b * key_row + t * key_token + (head - H) * key_head
        out = (token * G + head - H) * K
        _norm_rotate(key, key_after, key_weight, at, out, token, cos, sin, K, HALF, eps, BK, BHALF)


@triton.jit
def _rotate(x, y, at, out, token, cos, sin, K, HALF, sign, BK: tl.constexpr, BHALF: tl.constexpr):
    """One head [K] at x + at, its first 2 HALF entries rotated, written to y + out."""
    j = tl.arange(0, BHALF)
    in_half = j < HALF
    c = tl.load(cos + token * HALF + j, mask=in_half, other=0.0).to(tl.float32)
    s = tl.load(sin + token * HALF + j, mask=in_half, other=0.0).to(tl.float32) * sign
    first = tl.load(x + at + j, mask=in_half, other=0.0).to(tl.float32)
    second = tl.load(x + at + HALF + j, mask=in_half, other=0.0).to(tl.float32)
    tl.store(y + out + j, (first * c - second * s).to(y.dtype.element_ty), mask=in_half)
    tl.store(y + out + HALF + j, (second * c + first * s).to(y.dtype.element_ty), mask=in_half)
    column = tl.arange(0, BK)
    rest = (column >= 2 * HALF) & (column < K)
    tl.store(y + out + column, tl.load(x + at + column, mask=rest, other=0.0), mask=rest)


@triton.jit(do_not_specialize=["T"])
def rotary_kernel(
    query, key, cos, sin, query_after, key_after, T, H, G, K, HALF, sign,
    query_row, query_token, query_head, key_row, key_token, key_head, BK: tl.constexpr, BHALF: tl.constexpr,
):  # fmt: skip
    """One head of one token: program (b T + t, h) with the heads of query first, then those of key."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    b, t = token // T, token % T
    if head < H:
        at = b * query_row + t * query_token + head * query_head
        _rotate(query, query_after, at, (token * H + head) * K, token, cos, sin, K, HALF, sign, BK, BHALF)
    else:
        at = b * key_row + t * key_token + (head - H) * key_head
        _rotate(key, key_after, at, (token * G + head - H) * K, token, cos, sin, K, HALF, sign, BK, BHALF)
