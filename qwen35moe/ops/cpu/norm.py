"""The norms of `ops.norm`, a block of rows at a time.

On a CPU the definition spends most of its time on page faults: each of its temporaries is as large as x in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen35moe.ops.norm import gated_rms_norm, rms_norm
from qwen35moe.ops.precision import wide_dtype, without_autocast

_BLOCK = 1 << 18  # numbers in the rows of one block: 1 MB in float32 stays in cache


@rms_norm.implementation("cpu", device="cpu", compiles=False, differentiable=False, transforms=())
@without_autocast
def rms_norm_cpu(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """`rms_norm` without a backward."""
    dtype = wide_dtype(x)
    factor = 1.0 + weight.to(dtype)
    if x.numel() <= _BLOCK:
        wide = x.to(dtype)
        return (wide * _scale(wide, eps)).mul_(factor).to(x.dtype)

    def norm(rows: Tensor, out: Tensor) -> None:
        torch.mul(rows, _scale(rows, eps), out=out).mul_(factor)

    return _by_blocks(norm, x)


@gated_rms_norm.implementation("cpu", device="cpu", compiles=False, transforms=(), double_backward=False)
def gated_rms_norm_cpu(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """`gated_rms_norm`, differentiable once; the backward keeps x, gate and weight alone."""
    return _GatedRMSNorm.apply(x, gate, weight, eps)  # pyright: ignore[reportReturnType]


class _GatedRMSNorm(torch.autograd.Function):
    """y = n w silu(g) with n = x r, r = 1 / sqrt(mean(x^2) + eps).

    Backward, with dn = dy w silu(g): dx = r (dn - n mean(dn n)); dg = dy n w silu'(g); dw = sum dy n silu(g).
    """

    @staticmethod
    @without_autocast
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, gate, weight)
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        factor = weight.to(wide_dtype(x, gate))

        def norm(rows: Tensor, gates: Tensor, out: Tensor) -> None:
            torch.mul(rows, _scale(rows, eps, out), out=out).mul_(factor).mul_(F.silu(gates, inplace=True))

        return _by_blocks(norm, x, gate)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return None, None, None, None
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
            silu = F.silu(g)
            d_product = d * n
            d_gate[rows] = torch.ops.aten.silu_backward(d_product * factor, g)
            d_weight += d_product.mul_(silu).sum(0)
            d_n = d.mul_(silu).mul_(factor)
            d_x[rows] = d_n.addcmul_(n, torch.linalg.vecdot(d_n, n).div_(-width)[:, None]).mul_(scale)
        return d_x.view(x.shape), d_gate.view(gate.shape), d_weight.to(weight.dtype), None


def _by_blocks(function: Callable[..., None], x: Tensor, *others: Tensor) -> Tensor:
    """Apply `function` to blocks of rows in `wide_dtype`. It writes its result into its last argument and may overwrite the
    blocks of `others`, copies in memory that is used for every block; that of x may be a view.

    New memory for each block would cost as much as the arithmetic where the allocator gives it back to the system in between.
    """
    dtype, width = wide_dtype(x, *others), x.shape[-1]
    flat = [tensor.reshape(-1, width) for tensor in (x, *others)]
    out, step = torch.empty_like(flat[0], memory_format=torch.contiguous_format), max(1, _BLOCK // max(1, width))
    narrow = x.dtype != dtype
    result, *copies = (out.new_empty(min(step, len(out)), width, dtype=dtype) for _ in range(len(flat) + 1))
    for start in range(0, len(out), step):
        rows, target = [tensor[start : start + step] for tensor in flat], out[start : start + step]
        count = len(target)
        wide = [copy[:count].copy_(part) for copy, part in zip(copies[1 - narrow :], rows[1 - narrow :], strict=True)]
        if narrow:
            function(*wide, result[:count])
            target.copy_(result[:count])
        else:
            function(rows[0], *wide, target)
    return out.view(x.shape)


def _scale(rows: Tensor, eps: float, work: Tensor | None = None) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis [..., 1]. work: memory for the squares, which may not be that of `rows`."""
    squares = torch.linalg.vecdot(rows, rows) if work is None else torch.mul(rows, rows, out=work).sum(-1)
    return squares.div_(rows.shape[-1]).add_(eps).rsqrt_()[..., None]


def normalise_(rows: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, in place."""
    return rows.mul_(_scale(rows, eps))
