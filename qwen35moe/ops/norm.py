"""Root-mean-square normalisation, in the two forms of this architecture, and the l2 norm of queries and keys.

Zhang & Sennrich 2019 (RMSNorm). The decoder's norms store their weight around zero and apply 1 + w; the output norm of
Gated DeltaNet stores it around one, applies w, and is followed by a SiLU gate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.backends import operation
from qwen35moe.ops.precision import wide_dtype


@operation
def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * (1 + weight), over the last axis.

    x [..., D], weight [D]; returns [..., D] in x's dtype. Arithmetic in float32 at least: a sum of squares in bfloat16 is wrong
    in its third digit.
    """
    dtype = wide_dtype(x)
    wide = x.to(dtype)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale * (1.0 + weight.to(dtype))).to(x.dtype)


@operation(composes=("rms_norm",))
def add_rms_norm(residual: Tensor, change: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """h = residual + change and rms_norm(h), in one pass over the residual stream.

    residual, change [..., D], weight [D]; returns both [..., D] in residual's dtype. `change` and then h are rounded to that
    dtype, as by an addition followed by a norm.
    """
    hidden = residual + change.to(residual.dtype)
    return hidden, rms_norm.definition(hidden, weight, eps=eps)


@operation
def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight * silu(gate), over the last axis; the norm comes before the gate.

    x, gate [..., V], weight [V]; returns [..., V] in x's dtype, rounded once at the end.
    """
    dtype = wide_dtype(x, gate)
    wide = x.to(dtype)
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(dtype) * F.silu(gate.to(dtype))).to(x.dtype)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last axis, in x's dtype, which should be float32 at least. A zero vector stays zero."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)
