"""Triton kernels of the RMS norm; `norm.py` launches them. One program holds whole rows, in float32."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(x, weight, y, rows, D, x_row, eps, BR: tl.constexpr, BD: tl.constexpr):
    """y = x / sqrt(mean(x^2) + eps) * (1 + weight) for BR of the rows, which begin every x_row numbers."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.arange(0, BD)
    mask = (row < rows)[:, None] & (column < D)[None, :]
    wide = tl.load(x + row[:, None] * x_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=1) / D + eps)
    out = wide * scale[:, None] * (1.0 + w)[None, :]
    tl.store(y + row[:, None] * D + column[None, :], out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def add_kernel(residual, change, weight, total, y, rows, D, eps, BR: tl.constexpr, BD: tl.constexpr):
    """total = residual + change and y = rms_norm(total), in total's dtype, for BR of the rows [D]. total is rounded before the
    norm."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.arange(0, BD)
    mask = (row < rows)[:, None] & (column < D)[None, :]
    at = row[:, None] * D + column[None, :]
    added = tl.load(change + at, mask=mask, other=0.0).to(total.dtype.element_ty).to(tl.float32)
    added = (tl.load(residual + at, mask=mask, other=0.0).to(tl.float32) + added).to(total.dtype.element_ty)
    tl.store(total + at, added, mask=mask)
    wide = added.to(tl.float32)
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=1) / D + eps)
    out = wide * scale[:, None] * (1.0 + w)[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(dy, x, weight, dx, dweight, rows, D, x_row, eps, BR: tl.constexpr, BD: tl.constexpr):
    """dx of the blocks of BR rows of this program, and the sum of their weight gradients, dweight [programs, D].

    With n = x / rms:  dw = sum dy n,  dn = dy (1 + w),  dx = (dn - n mean(dn n)) / rms.
    """
    column = tl.arange(0, BD)
    in_d = column < D
    w = tl.load(weight + column, mask=in_d, other=0.0).to(tl.float32)
    total = tl.zeros([BD], dtype=tl.float32)
    block = tl.program_id(0)
    while block < tl.cdiv(rows, BR):  # the interpreter takes a constexpr only as the end of `range`
        row = tl.arange(0, BR).to(tl.int64) + block.to(tl.int64) * BR
        mask = (row < rows)[:, None] & in_d[None, :]
        at = row[:, None] * D + column[None, :]
        wide = tl.load(x + row[:, None] * x_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=1) / D + eps)
        normed = wide * scale[:, None]
        total += tl.sum(grad * normed, axis=0)
        dn = grad * (1.0 + w)[None, :]
        back = (dn - normed * (tl.sum(dn * normed, axis=1) / D)[:, None]) * scale[:, None]
        tl.store(dx + at, back.to(dx.dtype.element_ty), mask=mask)
        block += tl.num_programs(0)
    tl.store(dweight + tl.program_id(0).to(tl.int64) * D + column, total, mask=in_d)
