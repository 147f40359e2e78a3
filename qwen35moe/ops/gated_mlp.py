"""The gated MLP of the shared expert, and the sum of a mixture-of-experts block.

    a = silu(W_gate x) * (W_up x)                                         Shazeer 2020, "GLU Variants Improve Transformer"
    h = residual + routed + sigmoid(w_s x) * shared

The modules compose these from `ops.linear` and torch's functions, unless a fused implementation supports the call.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from qwen35moe.backends import operation


@operation(composes=("linear",))
def swiglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """silu(W_gate x) * (W_up x). x [..., D], weights [F, D]; returns [..., F]."""
    return F.silu(F.linear(x, gate_weight)) * F.linear(x, up_weight)


@operation(composes=("linear",))
def add_shared_expert(residual: Tensor, routed: Tensor, shared: Tensor, x: Tensor, gate_weight: Tensor) -> Tensor:
    """residual + routed + sigmoid(w_s x) * shared, the residual stream after a mixture-of-experts block.

    residual, routed, shared and x, the input of the block, [..., D], gate_weight [1, D]; returns [..., D] in residual's dtype.
    """
    output = routed + F.linear(x, gate_weight).sigmoid() * shared
    return residual + output.to(residual.dtype)
