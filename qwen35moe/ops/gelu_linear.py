"""A linear map and the activation behind it, as one operation.

    y = gelu(W x + b)          gelu(z) = z Phi(z), or its tanh form z / 2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3)))

Hendrycks & Gimpel 2016.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from qwen35moe.backends import operation
from qwen35moe.ops.linear import linear


@operation
def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor, *, approximate: str) -> Tensor:
    """x [N, D], weight [F, D], bias [F]; returns [N, F]. approximate: "none" or "tanh", as in F.gelu."""
    return F.gelu(linear.inside(x, weight, bias), approximate=approximate)
