"""Triton kernels of the gated RMS norm; `gated_norm.py` launches them. One program holds a whole row, in float32."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright reads the kernels as Python: `static_range` is not iterable there, and constexprs are not numbers.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _silu(gate):
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    return gate * sigmoid, sigmoid


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(x, gate, weight, y, rows, V, eps, BR: tl.constexpr, BV: tl.constexpr):
    """y = x / sqrt(mean(x^2) + eps) * weight * silu(gate) for BR of the rows."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.arange(0, BV)
    at = row[:, None] * V + column[None, :]
    mask = (row < rows)[:, None] & (column < V)[None, :]
    wide = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    factor, _ = _silu(tl.load(gate + at, mask=mask, other=0.0).to(tl.float32))
    w = tl.load(weight + column, mask=column < V, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, axis=1) / V + eps)
    out = wide * scale[:, None] * w[None, :] * factor
    tl.store(y + at, out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(dy, x, gate, weight, dx, dgate, dweight, rows, V, eps, BR: tl.constexpr, BV: tl.constexpr):
    """dx and dgate of the blocks of BR rows of this program, and the sum of their weight gradients, dweight [programs, V].

    With n = x / rms:  dgate = dy n w silu'(gate),  dw = sum dy n silu(gate),  dn = dy w silu(gate),
    dx = (dn - n mean(dn n)) / rms.
    """
    column = tl.arange(0, BV)
    in_v = column < V
    w = tl.load(weight + column, mask=in_v, other=0.0).to(tl.float32)
    total = tl.zeros([BV], dtype=tl.float32)
    block = tl.program_id(0)
    while block < tl.cdiv(rows, BR):  # the interpreter takes a constexpr only as the end of `range`
        row = tl.arange(0, BR).to(tl.int64) + block * BR
        at = row[:, None] * V + column[None, :]
        mask = (row < rows)[:, None] & in_v[None, :]
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
