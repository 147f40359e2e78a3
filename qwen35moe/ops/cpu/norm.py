"""The norms of `ops.norm`, a block of rows at a time.

On a CPU the definition spends most of its time on page faults: each of its temporaries is as large as x in float32.
"""

from __future__ import annotations

import math
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
def rms_norm_cpu(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """`rms_norm` without a backward.

    One token takes few calls of PyTorch functions: after the products of a decode step have emptied the caches, each call costs
    about 10 us, whatever its size. Hence the scale is a number of Python.
    """
    if x.numel() != weight.numel() or not x.numel() or type(x) is not Tensor or torch.is_autocast_enabled("cpu"):
        return _rows(x, weight, eps)
    if torch._C._len_torch_dispatch_stack():  # of a mode that may have tensors without values
        return _rows(x, weight, eps)
    wide = x if x.dtype is torch.float32 or x.dtype is torch.float64 else x.float()
    row = wide.reshape(-1)
    square = torch.dot(row, row).item() / row.shape[0] + eps
    scale = square**-0.5 if square > 0 else math.inf if square == 0 else math.nan
    factor = torch.rsub(weight.to(wide.dtype), scale, alpha=-scale)  # scale (1 + weight)
    return wide.mul(factor).to(x.dtype)


@without_autocast
def _rows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dtype = wide_dtype(x)
    factor = 1.0 + weight.to(dtype)

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
            torch.mul(rows, _scale(rows, eps), out=out).mul_(factor).mul_(F.silu(gates, inplace=True))

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


def _by_blocks(function: Callable[..., None], *tensors: Tensor) -> Tensor:
    """Apply `function` to blocks of rows in `wide_dtype`: copies, which it may overwrite, but the first one may be a view.

    It writes its result into its last argument, which may be the first one. The copies of all blocks are in the same memory.
    """
    x, dtype, width = tensors[0], wide_dtype(*tensors), tensors[0].shape[-1]
    if x.numel() <= _BLOCK:
        wide = [tensor.to(dtype, copy=True, memory_format=torch.contiguous_format) for tensor in tensors]
        function(*wide, wide[0])
        return wide[0].to(x.dtype)
    flat = [tensor.reshape(-1, width) for tensor in tensors]
    out, step = torch.empty_like(flat[0], memory_format=torch.contiguous_format), max(1, _BLOCK // max(1, width))
    viewed = x.dtype == dtype
    copies = [out.new_empty(min(step, len(out)), width, dtype=dtype) for _ in flat[viewed:]]
    for start in range(0, len(out), step):
        rows, target = [tensor[start : start + step] for tensor in flat], out[start : start + step]
        wide = [copy[: len(target)].copy_(part) for copy, part in zip(copies, rows[viewed:], strict=True)]
        if viewed:
            function(rows[0], *wide, target)
        else:
            function(*wide, wide[0])
            target.copy_(wide[0])
    return out.view(x.shape)


def _scale(rows: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis [..., 1]."""
    return torch.linalg.vecdot(rows, rows).div_(rows.shape[-1]).add_(eps).rsqrt_()[..., None]


def normalise_(rows: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, in place."""
    squares = torch.linalg.vecdot(rows, rows)  # not by `_scale`: a decode step has a limit of Python calls
    return rows.mul_(squares.div_(rows.shape[-1]).add_(eps).rsqrt_()[..., None])
