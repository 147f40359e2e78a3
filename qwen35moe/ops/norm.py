"""Root-mean-square normalisation, in the three forms this architecture uses.

Zhang & Sennrich 2019 (RMSNorm). The decoder's norms store their weight around zero and apply 1 + w; the output norm of
Gated DeltaNet stores it around one, applies w, and is followed by a SiLU gate.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe import backends
from qwen35moe.ops.precision import wide_dtype


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * (1 + weight), over the last axis.

    x [..., D], weight [D]; returns [..., D] in x's dtype. The arithmetic is float32 at least: squares of bfloat16
    activations summed in bfloat16 lose the norm's third digit.
    """
    dtype = wide_dtype(x)
    wide = x.to(dtype)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale * (1.0 + weight.to(dtype))).to(x.dtype)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight * silu(gate), over the last axis; the norm comes before the gate.

    x, gate [..., V], weight [V]; returns [..., V] in x's dtype, rounded once at the end.
    """
    dtype = wide_dtype(x, gate)
    wide = x.to(dtype)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(dtype) * F.silu(gate.to(dtype))).to(x.dtype)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last axis, in x's dtype: callers widen first. A zero vector stays zero."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)


def _rms_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Iterator[tuple[tuple, dict]]:
    for shape in ((2, 5, 24), (1, 1, 7), (3, 130)):
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        weight = 0.3 * torch.randn(shape[-1], generator=generator, dtype=torch.float64).to(device, dtype)
        yield (x, weight), {"eps": 1e-6}


def _gated_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Iterator[tuple[tuple, dict]]:
    for (x, weight), options in _rms_cases(dtype, device, generator):
        gate = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(device, dtype)
        yield (x, gate, 1 + weight), options


backends.register("rms_norm", "torch", rms_norm)
backends.register("gated_rms_norm", "torch", gated_rms_norm)
backends.add_cases("rms_norm", rms_norm, _rms_cases)
backends.add_cases("gated_rms_norm", gated_rms_norm, _gated_cases)
