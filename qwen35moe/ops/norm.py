"""Root-mean-square normalisation, in the three forms this architecture uses.

Zhang & Sennrich 2019 (RMSNorm). The decoder's norms store their weight around zero and apply 1 + w; the output norm of
Gated DeltaNet stores it around one, applies w, and is followed by a SiLU gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen35moe import backends
from qwen35moe.ops.precision import wide_dtype, without_autocast


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


_BLOCK = 1 << 18  # numbers in the rows that are worked on at once: 1 MB in float32 stays in cache


@without_autocast
def inplace_rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """`rms_norm` without a backward, a block of rows at a time in memory of its own. On a CPU the definition's time is
    mostly that of fresh pages: each of its temporaries is as large as x in float32."""
    factor = 1.0 + weight.to(wide_dtype(x))
    return _by_blocks(lambda rows: normalised(rows, eps).mul_(factor), x)


def inplace_gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """`gated_rms_norm` in the same way; differentiable once, for which it keeps x and gate alone."""
    return _GatedInPlace.apply(x, gate, weight, eps)  # pyright: ignore[reportReturnType]


class _GatedInPlace(torch.autograd.Function):
    """y = n w silu(g) with n = x r, r = 1 / sqrt(mean(x^2) + eps).

    Backward, with dn = dy w silu(g): dx = r (dn - n mean(dn n)); dg = dy n w silu'(g); dw = sum dy n silu(g).
    """

    @staticmethod
    @without_autocast
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, gate, weight)
        ctx.eps = eps
        factor = weight.to(wide_dtype(x, gate))

        def norm(rows: Tensor, gates: Tensor) -> Tensor:
            return normalised(rows, eps).mul_(factor).mul_(F.silu(gates, inplace=True))

        return _by_blocks(norm, x, gate)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, gate, weight = ctx.saved_tensors
        dtype = wide_dtype(x, gate)
        factor, width = weight.to(dtype), x.shape[-1]
        flat, flat_gate, d_y = (tensor.reshape(-1, width) for tensor in (x, gate, grads[0]))
        d_x, d_gate, d_weight = torch.empty_like(flat), torch.empty_like(flat_gate), torch.zeros_like(factor)
        step = max(1, _BLOCK // max(1, width))
        for rows in (slice(start, start + step) for start in range(0, flat.shape[0], step)):
            n, g, d = (tensor[rows].to(dtype, copy=True) for tensor in (flat, flat_gate, d_y))
            scale = torch.linalg.vecdot(n, n).div_(width).add_(ctx.eps).rsqrt_()[:, None]
            n *= scale
            opened = F.silu(g)
            each = d * n
            d_gate[rows] = torch.ops.aten.silu_backward(each * factor, g)
            d_weight += each.mul_(opened).sum(0)
            d_n = d.mul_(opened).mul_(factor)
            d_x[rows] = d_n.addcmul_(n, torch.linalg.vecdot(d_n, n).div_(-width)[:, None]).mul_(scale)
        return d_x.view(x.shape), d_gate.view(gate.shape), d_weight.to(weight.dtype), None


def _by_blocks(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function over blocks of rows, each given a wide copy that it may write to."""
    dtype = wide_dtype(*tensors)
    flat = [x.reshape(-1, x.shape[-1]) for x in tensors]
    out = torch.empty_like(flat[0])
    step = max(1, _BLOCK // max(1, out.shape[-1]))
    for start in range(0, out.shape[0], step):
        out[start : start + step] = function(*(x[start : start + step].to(dtype, copy=True) for x in flat))
    return out.view(tensors[0].shape)


def normalised(rows: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, written over x."""
    squares = torch.linalg.vecdot(rows, rows)
    return rows.mul_(squares.div_(rows.shape[-1]).add_(eps).rsqrt_()[..., None])


def _cannot_be_in_place(x: Tensor, *args: Tensor, eps: float) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}, not on a CPU"
    return "a graph is being compiled" if torch.compiler.is_compiling() else None


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


backends.register("rms_norm", "cpu", inplace_rms_norm, _cannot_be_in_place, differentiable=False)
backends.register("rms_norm", "torch", rms_norm)
backends.register("gated_rms_norm", "cpu", inplace_gated_rms_norm, _cannot_be_in_place)
backends.register("gated_rms_norm", "torch", gated_rms_norm)
backends.add_cases("rms_norm", rms_norm, _rms_cases)
backends.add_cases("gated_rms_norm", gated_rms_norm, _gated_cases)
