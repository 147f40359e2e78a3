"""gelu(W x + b) with the activation in the product's epilogue. Contract in `ops.gelu_linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen35moe.ops.gelu_linear import gelu_linear


def _missing() -> str | None:
    """Why this build or processor does not have it."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this build of torch has no oneDNN with pointwise epilogues"
    known = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return None if known() else "oneDNN has no bfloat16 products on this processor"


def _unsupported(x: Tensor, weight: Tensor, bias: Tensor, *, approximate: str) -> str | None:
    if x.device.type != "cpu" or {x.dtype, weight.dtype, bias.dtype} != {torch.bfloat16}:
        return f"x is {x.dtype} on {x.device}, not bfloat16 on a CPU as the weights must be too"
    return None if torch.backends.mkldnn.enabled else "torch.backends.mkldnn.enabled is False"


@gelu_linear.implementation("onednn", _unsupported, differentiable=False, missing=_missing(), compiles=False)
def onednn_gelu_linear(x: Tensor, weight: Tensor, bias: Tensor, *, approximate: str) -> Tensor:
    """Without a backward. oneDNN applies gelu to the float32 sums before it rounds and stores them, and [N, F] is
    written once and not read again. torch exposes it to its compiler alone."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], approximate)
