"""The Triton kernel of the sum of a mixture-of-experts block; `shared_expert.py` launches it."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_kernel(residual, routed, shared, x, gate_weight, out, D, BD: tl.constexpr):
    """One row of out = residual + routed + sigmoid(w_s x) * shared, in float32."""
    column = tl.arange(0, BD)
    mask = column < D
    at = tl.program_id(0).to(tl.int64) * D + column
    product = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    product *= tl.load(gate_weight + column, mask=mask, other=0.0).to(tl.float32)
    gate = 1.0 / (1.0 + tl.exp(-tl.sum(product, axis=0)))
    total = tl.load(routed + at, mask=mask, other=0.0).to(tl.float32)
    total += gate * tl.load(shared + at, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)
