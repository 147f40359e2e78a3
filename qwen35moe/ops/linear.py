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


@operation(composes=("linear",))
def projections(
    x: Tensor, first: Tensor, second: Tensor, third: Tensor, fourth: Tensor | None = None
) -> tuple[Tensor, ...]:
    """x W_i^T for three or four weights: all projections of a mixer's input.

    x [..., D], weights [F_i, D]; returns as many products [..., F_i]. For few rows one launch takes the time of reading the
    weights, while a small product of its own takes longer to start than to run.
    """
    return tuple(F.linear(x, weight) for weight in (first, second, third, fourth) if weight is not None)
