"""The norms as modules with a weight and an epsilon."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen35moe import ops
from qwen35moe.modules.fp32_parameters import FP32Parameters, new_fp32
from qwen35moe.modules.hooks import fusible
from qwen35moe.modules.initialise import Draws, Initialised


@fusible
class RMSNorm(Initialised):
    """x / sqrt(mean(x^2) + eps) (1 + weight), over the last axis of width `size`; the weight is stored around zero."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size))

    def draw(self, draws: Draws, std: float) -> None:
        """The identity."""
        self.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, eps=self.eps, caller=self)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


@fusible
class GatedRMSNorm(FP32Parameters):
    """x / sqrt(mean(x^2) + eps) weight silu(gate), over the last axis of width `size`; the weight is stored around one.

    The weight stays float32, as it is published: rounding it to bfloat16 changes outputs of the layer by up to 2^-9.
    """

    fp32_parameters = ("weight",)

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = new_fp32(size, value=1)

    def draw(self, draws: Draws, std: float) -> None:
        """The identity."""
        self.weight.fill_(1)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return ops.gated_rms_norm(x, gate, self.weight, eps=self.eps, caller=self)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
