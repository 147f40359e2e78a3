"""The norms as modules: a weight and an epsilon."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen35moe import ops
from qwen35moe.modules.fp32_parameters import FP32Parameters


class RMSNorm(nn.Module):
    """rms_norm(x) (1 + weight), over the last axis of width `size`; the weight is stored around zero."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, eps=self.eps, caller=self)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class GatedRMSNorm(FP32Parameters):
    """rms_norm(x) weight silu(gate), over the last axis of width `size`; the weight is stored around one.

    The weight stays float32: Qwen3.5 publishes it so, and rounding it to bfloat16 costs up to 2^-9 of every output
    of the layer.
    """

    fp32_parameters = ("weight",)

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return ops.gated_rms_norm(x, gate, self.weight, eps=self.eps, caller=self)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
