"""Gated RMS norm in Triton, forward and backward: y = x / sqrt(mean(x^2) + eps) * weight * silu(gate).

x, gate [..., V], weight [V]; y [..., V] in x's dtype, rounded once at the end. See README.md for the tiling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen35moe_kernels import runtime

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ELEMENTS, _ELEMENTS_BACKWARD = 4096, 2048  # of x in one program
_WIDEST = 8192
_PROGRAMS = 1024  # of the backward, at most: each loops over its rows and writes one partial sum of the weight's gradient


def unsupported(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float) -> str | None:
    """None, or the reason why these kernels cannot run this call."""
    if x.shape[-1] > _WIDEST:
        return f"x has rows of {x.shape[-1]}, one program holds {_WIDEST}"
    if x.shape != gate.shape:
        return f"gate {list(gate.shape)} would be broadcast over x {list(x.shape)}"
    return runtime.unsupported_device(x=x, gate=gate, weight=weight) or runtime.unsupported_dtype(
        *_FLOATS, x=x, gate=gate, weight=weight
    )


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """y; see the top of this file."""
    if torch.compiler.is_compiling() or runtime.needs_gradient(x, gate, weight):
        return _operation(x, gate, weight, eps)
    return _forward(x, gate, weight, eps)


def _rows(elements: int, x: Tensor) -> tuple[int, int, dict[str, int]]:
    """Number of rows, number of blocks, and the block's shape."""
    width = runtime.power_of_two(x.shape[-1])
    count = x.numel() // max(1, x.shape[-1])
    block = min(max(1, elements // width), runtime.power_of_two(count))
    return count, runtime.parts(count, block), {"BR": block, "BV": width}


def _forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    return normed(x, gate, weight, eps, x.dtype)


def normed(x: Tensor, gate: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """y in the given dtype, without a gradient."""
    kernels = runtime.kernels("gated_norm_kernels")

    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows, blocks, shape = _rows(_ELEMENTS, x)
    with runtime.on_device_of(x):
        kernels.forward_kernel[(blocks,)](
            x.contiguous(), gate.contiguous(), weight.contiguous(), y, rows, x.shape[-1], eps, **shape
        )
    return y


def _backward(dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    kernels = runtime.kernels("gated_norm_kernels")

    dx, dgate = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, gate))
    rows, blocks, shape = _rows(_ELEMENTS_BACKWARD, x)
    programs = min(blocks, _PROGRAMS)
    partial_sums = torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
    tensors = (t.contiguous() for t in (dy, x, gate, weight))
    with runtime.on_device_of(x):
        kernels.backward_kernel[(programs,)](*tensors, dx, dgate, partial_sums, rows, x.shape[-1], eps, **shape)
    return dx, dgate, partial_sums.sum(0).to(weight.dtype)


_ARGUMENTS = "Tensor x, Tensor gate, Tensor weight, float eps"
_operation = torch.library.custom_op(
    "qwen35moe_kernels::gated_rms_norm", _forward, mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor"
)
_gradient = torch.library.custom_op(
    "qwen35moe_kernels::gated_rms_norm_backward", _backward, mutates_args=(),
    schema=f"(Tensor dy, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip


@_operation.register_fake
def _shape(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@_gradient.register_fake
def _gradient_shapes(dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradient(dy, *ctx.saved_tensors, ctx.eps), None


_operation.register_autograd(_differentiate, setup_context=_save)


def register(register: Callable[..., None]) -> None:
    """Registers ahead of the PyTorch forms."""
    missing, place = runtime.missing(), runtime.place("cpu")
    register("gated_rms_norm", "triton", gated_rms_norm, unsupported, before=place, missing=missing, **runtime.FIRST_ORDER)
