"""Triton kernels of the gated RMS norm; `gated_norm.py` launches them. A row lies whole in one program, in float32."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# Inside a kernel Python stands for Triton: its `static_range` is no iterable, its constexprs are numbers.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _silu(gate):
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    return gate * sigmoid, sigmoid


@triton.jit(do_not_specialize=["N"])
def forward_kernel(x, gate, weight, y, N, V, eps, R: tl.constexpr, BV: tl.constexpr):
    """y = x / sqrt(mean(x^2) + eps) * weight * silu(gate) for R of the N rows."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, BV)
    at = row[:, None] * V + column[None, :]
    mask = (row < N)[:, None] & (column < V)[None, :]
    wide = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    factor, _ = _silu(tl.load(gate + at, mask=mask, other=0.0).to(tl.float32))
    w = tl.load(weight + column, mask=column < V, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=1) / V + eps)
    out = wide * scale[:, None] * w[None, :] * factor
    tl.store(y + at, out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def backward_kernel(dy, x, gate, weight, dx, dgate, dweight, N, V, eps, R: tl.constexpr, BV: tl.constexpr):
    """dx and dgate of every R-th block of rows, and the sum of their weight gradients, dweight [programs, V].

    With n = x / rms:  dgate = dy n w silu'(gate),  dw = sum dy n silu(gate),  dn = dy w silu(gate),
    dx = (dn - n mean(dn n)) / rms.
    """
    column = tl.arange(0, BV)
    in_v = column < V
    w = tl.load(weight + column, mask=in_v, other=0.0).to(tl.float32)
    total = tl.zeros([BV], dtype=tl.float32)
    block = tl.program_id(0)
    while block < tl.cdiv(N, R):  # the interpreter cannot take `range` to a number that is no constexpr
        row = tl.arange(0, R).to(tl.int64) + block * R
        at = row[:, None] * V + column[None, :]
        mask = (row < N)[:, None] & in_v[None, :]
        wide = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        factor, sigmoid = _silu(z)
        scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=1) / V + eps)
        normed = wide * scale[:, None]
        slope = grad * normed * w[None, :] * (sigmoid * (1.0 + z * (1.0 - sigmoid)))
        tl.store(dgate + at, slope.to(dgate.dtype.element_ty), mask=mask)
        total += tl.sum(grad * factor * normed, axis=0)
        dn = grad * factor * w[None, :]
        back = (dn - normed * (tl.sum(dn * normed, axis=1) / V)[:, None]) * scale[:, None]
        tl.store(dx + at, back.to(dx.dtype.element_ty), mask=mask)
        block += tl.num_programs(0)
    tl.store(dweight + tl.program_id(0).to(tl.int64) * V + column, total, mask=in_v)
