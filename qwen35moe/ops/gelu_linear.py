"""A linear map and the activation behind it, as one operation.

    y = gelu(W x + b)          gelu(z) = z Phi(z), or its tanh form z / 2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3)))

Hendrycks & Gimpel 2016.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe import backends


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor, *, approximate: str) -> Tensor:
    """x [N, D], weight [F, D], bias [F]; returns [N, F]. approximate: "none" or "tanh", as in F.gelu."""
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def onednn_gelu_linear(x: Tensor, weight: Tensor, bias: Tensor, *, approximate: str) -> Tensor:
    """The same without a backward: oneDNN applies gelu to the float32 sums before it rounds and stores them, and [N, F] is
    written once and not read again. torch has it for its compiler alone."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], approximate)


def _missing() -> str | None:
    """Why this build or processor does not have it."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this build of torch has no oneDNN with pointwise epilogues"
    known = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    return None if known() else "oneDNN has no bfloat16 products on this processor"


def _cannot(x: Tensor, weight: Tensor, bias: Tensor, *, approximate: str) -> str | None:
    if x.device.type != "cpu" or {x.dtype, weight.dtype, bias.dtype} != {torch.bfloat16}:
        return f"x is {x.dtype} on {x.device}, not bfloat16 on a CPU as the weights must be too"
    if torch.compiler.is_compiling():
        return "a graph is being compiled"
    return None if torch.backends.mkldnn.enabled else "torch.backends.mkldnn.enabled is False"


def _cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Iterator[tuple[tuple, dict]]:
    for rows, width, inner, approximate in ((7, 12, 5, "tanh"), (1, 33, 40, "none"), (65, 8, 3, "tanh")):
        shapes = (rows, width), (inner, width), (inner,)
        tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]
        yield tuple(tensors), {"approximate": approximate}


backends.register("gelu_linear", "onednn", onednn_gelu_linear, _cannot, differentiable=False, missing=_missing())
backends.register("gelu_linear", "torch", gelu_linear)
backends.add_cases("gelu_linear", gelu_linear, _cases)
