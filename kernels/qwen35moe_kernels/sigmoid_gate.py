"""The output gate of attention in Triton: y = x * sigmoid(gate) in one launch, without a copy of the gates.

x, gate [..., V] of one dtype; y [..., V], rounded once. The gates lie beside the queries in wider rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qwen35moe_kernels import runtime
from qwen35moe_kernels.norm import spaced_rows

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ELEMENTS, _WIDTH = 2048, 1024  # of x in one program, and of a row


def unsupported(x: Tensor, gate: Tensor) -> str | None:
    """None, or the reason why this kernel cannot run this call."""
    if x.shape != gate.shape:
        return f"gate {list(gate.shape)} would be broadcast over x {list(x.shape)}"
    if x.dtype != gate.dtype:
        return f"x is {x.dtype} and gate {gate.dtype}, the kernel takes one dtype"
    if x.shape[-1] > _WIDTH * 65535:
        return f"x has rows of {x.shape[-1]}, a grid holds {_WIDTH * 65535}"
    return runtime.unsupported_device(x=x, gate=gate) or runtime.unsupported_dtype(*_FLOATS, x=x, gate=gate)


def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """y; see the top of this file."""
    return (_operation if torch.compiler.is_compiling() else _gated)(x, gate)


def _gated(x: Tensor, gate: Tensor) -> Tensor:
    kernel = runtime.kernels("sigmoid_gate_kernels").gate_kernel

    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        wide, gates = spaced_rows(x), spaced_rows(gate)
        rows, V = wide.shape
        columns = min(_WIDTH, runtime.power_of_two(V))
        block = min(max(1, _ELEMENTS // columns), runtime.power_of_two(rows))
        with runtime.on_device_of(x):
            kernel[(runtime.parts(rows, block), runtime.parts(V, columns))](
                wide, gates, y, rows, V, wide.stride(0), gates.stride(0), BR=block, BV=columns
            )
    return y


_operation = torch.library.custom_op(
    "qwen35moe_kernels::sigmoid_gate", _gated, mutates_args=(), schema="(Tensor x, Tensor gate) -> Tensor"
)


@_operation.register_fake
def _shape(x: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def register(register: Callable[..., None]) -> None:
    """Registers ahead of the definition, which the layer composes."""
    register(
        "sigmoid_gate", "triton", sigmoid_gate, unsupported, before=runtime.place("torch"), missing=runtime.missing(),
        differentiable=False, transforms=(),
    )  # fmt: skip
