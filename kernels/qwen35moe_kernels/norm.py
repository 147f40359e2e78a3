"""RMS norm in Triton, forward and backward: y = x / sqrt(mean(x^2) + eps) * (1 + weight). Also after an addition, forward.

x [..., D], weight [D]; y [..., D] in x's dtype, rounded once at the end. x may be a part of wider rows, as the queries beside
their gates are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen35moe_kernels import runtime

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ELEMENTS, _ELEMENTS_BACKWARD = 4096, 4096  # of x in one program
_WIDEST = 16384
_PROGRAMS = 1024  # of the backward, at most: each loops over its rows and writes one partial sum of the weight's gradient


def unsupported(x: Tensor, weight: Tensor, *, eps: float) -> str | None:
    """None, or the reason why these kernels cannot run this call."""
    if x.shape[-1] > _WIDEST:
        return f"x has rows of {x.shape[-1]}, one program holds {_WIDEST}"
    return runtime.unsupported_device(x=x, weight=weight) or runtime.unsupported_dtype(*_FLOATS, x=x, weight=weight)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """y; see the top of this file."""
    if torch.compiler.is_compiling() or runtime.needs_gradient(x, weight):
        return _operation(x, weight, eps)
    return _forward(x, weight, eps)


def unsupported_add(residual: Tensor, change: Tensor, weight: Tensor, *, eps: float) -> str | None:
    """None, or the reason why the kernel of the sum and its norm cannot run this call."""
    if residual.shape != change.shape:
        return f"change {list(change.shape)} would be broadcast over residual {list(residual.shape)}"
    tensors = {"residual": residual, "change": change, "weight": weight}
    if residual.shape[-1] > _WIDEST:
        return f"residual has rows of {residual.shape[-1]}, one program holds {_WIDEST}"
    return runtime.unsupported_device(**tensors) or runtime.unsupported_dtype(*_FLOATS, **tensors)


def add_rms_norm(residual: Tensor, change: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """residual + change and its norm, both in residual's dtype."""
    return (_add_operation if torch.compiler.is_compiling() else _added)(residual, change, weight, eps)


def _added(residual: Tensor, change: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    kernel = runtime.kernels("norm_kernels").add_kernel

    total, y = (torch.empty(residual.shape, dtype=residual.dtype, device=residual.device) for _ in range(2))
    if y.numel():
        rows = residual.reshape(-1, residual.shape[-1]).contiguous()
        blocks, shape = _blocks(_ELEMENTS, rows)
        with runtime.on_device_of(residual):
            kernel[(blocks,)](rows, change.contiguous(), weight.contiguous(), total, y, *rows.shape, eps, **shape)
    return total, y


def spaced_rows(x: Tensor) -> Tensor:
    """x as [rows, D] with contiguous rows: a view where the leading axes are evenly spaced."""
    try:
        rows = x.view(-1, x.shape[-1])
    except (RuntimeError, ValueError):  # ValueError: of fake tensors
        return x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _blocks(elements: int, rows: Tensor) -> tuple[int, dict[str, int]]:
    """Number of blocks, and the block's shape."""
    width = runtime.power_of_two(rows.shape[1])
    block = min(max(1, elements // width), runtime.power_of_two(len(rows)))
    return runtime.parts(len(rows), block), {"BR": block, "BD": width, "num_warps": 8 if width > 4096 else 4}


def _forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    kernels = runtime.kernels("norm_kernels")

    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        rows = spaced_rows(x)
        blocks, shape = _blocks(_ELEMENTS, rows)
        with runtime.on_device_of(x):
            kernels.forward_kernel[(blocks,)](rows, weight.contiguous(), y, *rows.shape, rows.stride(0), eps, **shape)
    return y


def _backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    kernels = runtime.kernels("norm_kernels")

    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not dx.numel():
        return dx, torch.zeros_like(weight)
    rows = spaced_rows(x)
    blocks, shape = _blocks(_ELEMENTS_BACKWARD, rows)
    programs = min(blocks, _PROGRAMS)
    partial_sums = torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
    tensors = dy.contiguous(), rows, weight.contiguous(), dx, partial_sums
    with runtime.on_device_of(x):
        kernels.backward_kernel[(programs,)](*tensors, *rows.shape, rows.stride(0), eps, **shape)
    return dx, partial_sums.sum(0).to(weight.dtype)


_ARGUMENTS = "Tensor x, Tensor weight, float eps"
_operation = torch.library.custom_op(
    "qwen35moe_kernels::rms_norm", _forward, mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor"
)
_gradient = torch.library.custom_op(
    "qwen35moe_kernels::rms_norm_backward", _backward, mutates_args=(), schema=f"(Tensor dy, {_ARGUMENTS}) -> (Tensor, Tensor)"
)


@_operation.register_fake
def _shape(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@_gradient.register_fake
def _gradient_shapes(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradient(dy, *ctx.saved_tensors, ctx.eps), None


_operation.register_autograd(_differentiate, setup_context=_save)


_add_operation = torch.library.custom_op(
    "qwen35moe_kernels::add_rms_norm", _added, mutates_args=(),
    schema="(Tensor residual, Tensor change, Tensor weight, float eps) -> (Tensor, Tensor)",
)  # fmt: skip


@_add_operation.register_fake
def _add_shapes(residual: Tensor, change: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


def register(register: Callable[..., None]) -> None:
    """Registers ahead of the PyTorch forms."""
    missing, place = runtime.missing(), runtime.place("cpu")
    register("rms_norm", "triton", rms_norm, unsupported, before=place, missing=missing, **runtime.FIRST_ORDER)
    register(
        "add_rms_norm", "triton", add_rms_norm, unsupported_add, before=runtime.place("torch"), missing=missing,
        differentiable=False, transforms=(),
    )  # fmt: skip
