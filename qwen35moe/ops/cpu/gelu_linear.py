"""gelu(W x + b) with the activation fused into the product. Contract in `ops.gelu_linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen35moe.ops.gelu_linear import gelu_linear


def _missing() -> str | None:
    """The reason why this build of torch or this processor does not support it, or None."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this build of torch has no oneDNN with pointwise epilogues"
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return None if supported() else "oneDNN has no bfloat16 products on this processor"


def _unsupported(x: Tensor, weight: Tensor, bias: Tensor, *, approximate: str) -> str | None:
    if x.device.type != "cpu" or {x.dtype, weight.dtype, bias.dtype} != {torch.bfloat16}:
        return f"x, weight and bias must be bfloat16 on a CPU, x is {x.dtype} on {x.device}"
    return None if torch.backends.mkldnn.enabled else "torch.backends.mkldnn.enabled is False"


@gelu_linear.implementation("onednn", _unsupported, differentiable=False, missing=_missing(), compiles=False, transforms=())
def onednn_gelu_linear(x: Tensor, weight: Tensor, bias: Tensor, *, approximate: str) -> Tensor:
    """oneDNN applies gelu to the float32 sums before it rounds and stores them, so that [N, F] is written once and not read
    again. No backward. torch has this operator for its compiler; it is not part of the public API."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], approximate)
