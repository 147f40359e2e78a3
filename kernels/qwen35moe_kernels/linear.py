"""Products with few rows in Triton: all projections of a mixer in one launch, and gate and up projection with their SwiGLU.

    y_i = x W_i^T;          y = silu(x W_gate^T) * (x W_up^T)

x [..., D], weights [F, D]. For a decoded token the time of a product is that of reading its weight. One program multiplies one
row of x with a few rows of a weight; without matrix instructions, which need 16 rows. Many rows use torch's products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe_kernels import runtime

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ROWS = 4  # of x: more rows read the weights too often from the cache
# Rows of each weight in one program, of one weight and of two, and numbers of them that it loads at once. At D = 2048 a
# thread then starts all its loads, 16 bytes each, before it waits for the first.
_COLUMNS, _COLUMNS_TWO, _DEPTH = 4, 2, 1024
_ELEMENTS = 2048  # of silu_mul in one program


def unsupported(
    x: Tensor, first: Tensor, second: Tensor, third: Tensor, fourth: Tensor | None = None
) -> str | None:  # fmt: skip
    """None, or the reason why this kernel cannot run this call."""
    return _unsupported(x=x, first=first, second=second, third=third, fourth=fourth)


def slower(x: Tensor, first: Tensor, second: Tensor, third: Tensor, fourth: Tensor | None = None) -> str | None:
    """None, or the reason why torch's products are faster."""
    rows = _count(x)
    return None if rows <= _ROWS else f"x has {rows} rows, torch's products are faster from {_ROWS + 1} on"


def _count(x: Tensor) -> int:
    """The number of rows [D] of x."""
    return x.numel() // max(1, x.shape[-1])


def unsupported_swiglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> str | None:
    """None, or the reason why these kernels cannot run this call."""
    return _unsupported(x=x, gate_weight=gate_weight, up_weight=up_weight)


def _unsupported(x: Tensor, **weights: Tensor | None) -> str | None:
    if reason := runtime.unsupported_device(x=x, **weights):
        return reason
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is enabled, which chooses the dtype of products"
    for name, weight in weights.items():
        if weight is not None and weight.dtype != x.dtype:
            return f"x is {x.dtype} and {name} {weight.dtype}, the kernels take one dtype"
        if weight is not None and not weight.is_contiguous():
            return f"{name} is not contiguous, and copying it in every call would take longer than the kernels save"
    return runtime.unsupported_dtype(*_FLOATS, x=x)


def projections(
    x: Tensor, first: Tensor, second: Tensor, third: Tensor, fourth: Tensor | None = None
) -> tuple[Tensor, ...]:  # fmt: skip
    """The products; see the top of this file."""
    weights = [first, second, third] if fourth is None else [first, second, third, fourth]
    return tuple((_operation if torch.compiler.is_compiling() else _projected)(x, weights))


def _projected(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    kernel = runtime.kernels("linear_kernels").projections_kernel

    out = [torch.empty(*x.shape[:-1], len(w), dtype=x.dtype, device=x.device) for w in weights]
    D, rows = x.shape[-1], _count(x)
    if not rows:
        return out
    block = _block(D, _COLUMNS)
    blocks = sum(runtime.parts(len(w), block["BN"]) for w in weights)
    absent = 4 - len(weights)
    tensors = *weights, *weights[:1] * absent, *out, *out[:1] * absent
    sizes = *(len(w) for w in weights), *[0] * absent
    with runtime.on_device_of(x):
        kernel[(blocks * rows,)](x.contiguous(), *tensors, rows, *sizes, D=D, **block)
    return out


def swiglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """The activation; see the top of this file."""
    return (_swiglu_operation if torch.compiler.is_compiling() else _swiglu)(x, gate_weight, up_weight)


def _swiglu(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    kernels = runtime.kernels("linear_kernels")

    (inner, D), rows = gate_weight.shape, _count(x)
    y = torch.empty(*x.shape[:-1], inner, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    if rows > _ROWS:
        gate, up = F.linear(x, gate_weight), F.linear(x, up_weight)
        with runtime.on_device_of(x):
            kernels.silu_mul_kernel[(runtime.parts(y.numel(), _ELEMENTS),)](gate, up, y, y.numel(), B=_ELEMENTS)
        return y
    block = _block(D, _COLUMNS_TWO)
    with runtime.on_device_of(x):
        kernels.swiglu_kernel[(runtime.parts(inner, block["BN"]) * rows,)](
            x.contiguous(), gate_weight, up_weight, y, rows, inner, D=D, **block
        )
    return y


def _block(D: int, columns: int) -> dict[str, int]:
    return {"BN": columns, "BK": min(_DEPTH, runtime.power_of_two(D)), "num_warps": 4}


_operation = torch.library.custom_op(
    "qwen35moe_kernels::projections", _projected, mutates_args=(), schema="(Tensor x, Tensor[] weights) -> Tensor[]"
)
_swiglu_operation = torch.library.custom_op(
    "qwen35moe_kernels::swiglu", _swiglu, mutates_args=(), schema="(Tensor x, Tensor gate_weight, Tensor up_weight) -> Tensor"
)


@_operation.register_fake
def _shapes(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], w.shape[0]) for w in weights]


@_swiglu_operation.register_fake
def _swiglu_shape(x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], gate_weight.shape[0])


def register(register: Callable[..., None]) -> None:
    """Registers ahead of the definitions, which the modules compose."""
    options = {"before": runtime.place("torch"), "missing": runtime.missing(), "differentiable": False, "transforms": ()}
    register("projections", "triton", projections, unsupported, slower=slower, **options)
    register("swiglu", "triton", swiglu, unsupported_swiglu, **options)
