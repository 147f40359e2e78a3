"""The Triton kernel of the output gate of attention; `sigmoid_gate.py` launches it."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def gate_kernel(x, gate, y, rows, V, x_row, gate_row, BR: tl.constexpr, BV: tl.constexpr):
    """y = x * sigmoid(gate) for BR of the rows [V], which begin every x_row and gate_row numbers."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.program_id(1) * BV + tl.arange(0, BV)
    mask = (row < rows)[:, None] & (column < V)[None, :]
    value = tl.load(x + row[:, None] * x_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    z = tl.load(gate + row[:, None] * gate_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row[:, None] * V + column[None, :], (value / (1.0 + tl.exp(-z))).to(y.dtype.element_ty), mask=mask)
