"""The linear map of every projection, of the head, the router and the experts.

    y = W x + b

Forms for CPUs in `ops.cpu.linear`; which of them is fast depends on the processor, the dtype and the number of rows.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from qwen35moe.backends import operation


@operation
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., D], weight [F, D], bias [F]; returns [..., F]."""
    return F.linear(x, weight, bias)
