"""The sum of a mixture-of-experts block in Triton: residual + routed + sigmoid(w_s x) * shared in one launch.

residual, routed, shared, x [..., D], gate_weight [1, D]; returns [..., D] in residual's dtype, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qwen35moe_kernels import runtime

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 16384


def unsupported(residual: Tensor, routed: Tensor, shared: Tensor, x: Tensor, gate_weight: Tensor) -> str | None:
    """None, or the reason why this kernel cannot run this call."""
    if x.shape[-1] > _WIDEST:
        return f"x has rows of {x.shape[-1]}, one program holds {_WIDEST}"
    tensors = {"residual": residual, "routed": routed, "shared": shared, "x": x, "gate_weight": gate_weight}
    if reason := runtime.unsupported_device(**tensors):
        return reason
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is enabled, which chooses the dtype of products"
    return runtime.unsupported_dtype(*_FLOATS, **tensors)


def add_shared_expert(residual: Tensor, routed: Tensor, shared: Tensor, x: Tensor, gate_weight: Tensor) -> Tensor:
    """The sum; see the top of this file."""
    return (_operation if torch.compiler.is_compiling() else _added)(residual, routed, shared, x, gate_weight)


def _added(residual: Tensor, routed: Tensor, shared: Tensor, x: Tensor, gate_weight: Tensor) -> Tensor:
    kernel = runtime.kernels("shared_expert_kernels").add_kernel

    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    if out.numel():
        D = x.shape[-1]
        tensors = (tensor.contiguous() for tensor in (residual, routed, shared, x, gate_weight))
        with runtime.on_device_of(x):
            kernel[(out.numel() // D,)](*tensors, out, D, BD=runtime.power_of_two(D), num_warps=8 if D > 4096 else 4)
    return out


_operation = torch.library.custom_op(
    "qwen35moe_kernels::add_shared_expert", _added, mutates_args=(),
    schema="(Tensor residual, Tensor routed, Tensor shared, Tensor x, Tensor gate_weight) -> Tensor",
)  # fmt: skip


@_operation.register_fake
def _shape(residual: Tensor, routed: Tensor, shared: Tensor, x: Tensor, gate_weight: Tensor) -> Tensor:
    return residual.new_empty(residual.shape)


def register(register: Callable[..., None]) -> None:
    """Registers ahead of the definition, which the block composes."""
    register(
        "add_shared_expert", "triton", add_shared_expert, unsupported, before=runtime.place("torch"),
        missing=runtime.missing(), differentiable=False, transforms=(),
    )  # fmt: skip
