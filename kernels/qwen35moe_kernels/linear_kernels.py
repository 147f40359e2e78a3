"""Triton kernels of products with few rows; `linear.py` launches them. Every weight is read once, sums are float32."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _project(x, weight, y, row, block, F, D: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """BN columns of row `row` of y [rows, F] = x weight^T."""
    n = block * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    at = weight + n.to(tl.int64)[:, None] * D + k[None, :]
    total = tl.zeros([BN, BK], dtype=tl.float32)
    for start in range(0, D, BK):
        in_k = k < D - start
        value = tl.load(x + row * D + start + k, mask=in_k, other=0.0).to(tl.float32)
        total += value[None, :] * tl.load(at + start, mask=(n < F)[:, None] & in_k[None, :], other=0.0).to(tl.float32)
    tl.store(y + row * F + n, tl.sum(total, axis=1).to(y.dtype.element_ty), mask=n < F)


@triton.jit(do_not_specialize=["rows"])
def projections_kernel(
    x, w1, w2, w3, w4, y1, y2, y3, y4, rows, F1, F2, F3, F4, D: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """y_i [rows, F_i] = x w_i^T. The programs of a block of columns follow each other, so that the rows after the first read
    the weights from the cache."""
    row = (tl.program_id(0) % rows).to(tl.int64)
    block = tl.program_id(0) // rows
    second = tl.cdiv(F1, BN)
    third = second + tl.cdiv(F2, BN)
    fourth = third + tl.cdiv(F3, BN)
    if block < second:
        _project(x, w1, y1, row, block, F1, D, BN, BK)
    elif block < third:
        _project(x, w2, y2, row, block - second, F2, D, BN, BK)
    elif block < fourth:
        _project(x, w3, y3, row, block - third, F3, D, BN, BK)
    else:
        _project(x, w4, y4, row, block - fourth, F4, D, BN, BK)


@triton.jit(do_not_specialize=["rows"])
def swiglu_kernel(x, gate_weight, up_weight, y, rows, F, D: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """BN columns of one row of y [rows, F] = silu(x W_gate^T) * (x W_up^T)."""
    row = (tl.program_id(0) % rows).to(tl.int64)
    n = tl.program_id(0) // rows * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    at = n.to(tl.int64)[:, None] * D + k[None, :]
    gates = tl.zeros([BN, BK], dtype=tl.float32)
    ups = tl.zeros([BN, BK], dtype=tl.float32)
    for start in range(0, D, BK):  # both weights in one loop: no load waits for the sum of the other product
        in_k = k < D - start
        mask = (n < F)[:, None] & in_k[None, :]
        value = tl.load(x + row * D + start + k, mask=in_k, other=0.0).to(tl.float32)[None, :]
        gates += value * tl.load(gate_weight + at + start, mask=mask, other=0.0).to(tl.float32)
        ups += value * tl.load(up_weight + at + start, mask=mask, other=0.0).to(tl.float32)
    gate = tl.sum(gates, axis=1)
    up = tl.sum(ups, axis=1)
    tl.store(y + row * F + n, (gate / (1.0 + tl.exp(-gate)) * up).to(y.dtype.element_ty), mask=n < F)


@triton.jit
def silu_mul_kernel(gate, up, y, size, B: tl.constexpr):
    """y = silu(gate) * up for B of the numbers."""
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    g = tl.load(gate + at, mask=at < size, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(y + at, (g / (1.0 + tl.exp(-g)) * u).to(y.dtype.element_ty), mask=at < size)
