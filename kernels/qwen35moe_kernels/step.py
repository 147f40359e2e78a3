"""One token of Gated DeltaNet in one launch or two: convolution, gates, l2 norm, rule and gated norm. See README.md.

    q, k, v = silu(sum_w conv_weight[:, w] x_{t - W + 1 + w})
    decay = -exp(A_log) softplus(a + dt_bias);  beta = sigmoid(b)
    S' = exp(decay) S + k (x) beta (v - exp(decay) S^T k);  y = rms_norm(S'^T q / sqrt(K)) w silu(gate)

Everything between qkv and y is float32; the composed operations round to bfloat16 in between.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qwen35moe_kernels import runtime
from qwen35moe_kernels.gated_norm import normed

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST = 1 << 15  # elements of a head's recurrent state that one program holds in registers
# Up to _FEW heads the number of launches decides the time, and one program takes a whole head. Beyond, the loads in flight
# decide: a program with a whole head fills a multiprocessor, while several programs of 32 columns run on it side by side.
_FEW, _COLUMNS = 264, 32
# Named values of GatedDeltaNet that the kernel does not materialise.
SKIPS = ("conv", "query", "key", "value", "decay", "beta", "core")


def unsupported(
    qkv: Tensor, gate: Tensor, a: Tensor, b: Tensor, *, conv_state: Tensor, recurrent_state: Tensor, conv_weight: Tensor,
    A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor, groups: int, eps: float,
    active: Tensor | None = None,
) -> str | None:  # fmt: skip
    """None, or the reason why this kernel cannot run this call."""
    width, out = recurrent_state.shape[2:]
    size = runtime.power_of_two(width) * runtime.power_of_two(out)
    if size > _LARGEST:
        return f"recurrent_state has {width} x {out} elements per head, one program holds {_LARGEST}"
    if recurrent_state.dtype != torch.float32:
        return f"recurrent_state is {str(recurrent_state.dtype).removeprefix('torch.')}, not float32"
    if recurrent_state.shape[1] > 65535:
        return f"recurrent_state has {recurrent_state.shape[1]} heads, a grid holds 65535"
    floats = {
        "qkv": qkv, "gate": gate, "a": a, "b": b, "conv_state": conv_state, "conv_weight": conv_weight, "A_log": A_log,
        "dt_bias": dt_bias, "norm_weight": norm_weight,
    }  # fmt: skip
    if active is not None and not recurrent_state.is_contiguous():
        return "recurrent_state is not contiguous and would be written in place"
    device = runtime.unsupported_device(recurrent_state=recurrent_state, **floats)
    return device or runtime.unsupported_dtype(*_FLOATS, **floats)


def delta_net_step(
    qkv: Tensor, gate: Tensor, a: Tensor, b: Tensor, *, conv_state: Tensor, recurrent_state: Tensor, conv_weight: Tensor,
    A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor, groups: int, eps: float, active: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The normed output [B, H, V] in qkv's dtype; conv_state [B, C, W-1] and recurrent_state [B, H, K, V] after the token. With
    `active` [B] bool the kernel writes these rows of recurrent_state in place."""
    tensors = (qkv, gate, a, b, conv_state, recurrent_state, conv_weight, A_log, dt_bias, norm_weight)
    if active is None:
        run = _operation if torch.compiler.is_compiling() else _forward
        return run(*tensors, groups, eps)
    if torch.compiler.is_compiling():
        y, after = _operation_in_place(*tensors, groups, eps, active)
        return y, after, recurrent_state
    return _forward(*tensors, groups, eps, active)


def _forward(
    qkv: Tensor, gate: Tensor, a: Tensor, b: Tensor, conv_state: Tensor, recurrent_state: Tensor, conv_weight: Tensor,
    A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor, groups: int, eps: float, active: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kernel = runtime.kernels("step_kernels").step_kernel

    (rows, channels), taps = qkv.shape, conv_weight.shape[-1]
    heads, width, out = recurrent_state.shape[1:]
    columns = runtime.power_of_two(out)
    if rows * heads > _FEW:
        columns = min(columns, _COLUMNS)
    whole, block = columns >= out, {"BK": runtime.power_of_two(width), "BV": columns}
    y = torch.empty(rows, heads, out, dtype=qkv.dtype if whole else torch.float32, device=qkv.device)
    conv_state_after = torch.empty(rows, channels, taps - 1, dtype=qkv.dtype, device=qkv.device)
    recurrent_state_after = recurrent_state  # a program reads its part of it before it writes that
    if active is None:
        recurrent_state_after = torch.empty(recurrent_state.shape, dtype=recurrent_state.dtype, device=recurrent_state.device)
    tensors = (qkv, gate, a, b, conv_state, recurrent_state, conv_weight, A_log, dt_bias, norm_weight)
    with runtime.on_device_of(qkv):
        kernel[(rows, heads, runtime.parts(out, columns))](
            *(tensor.contiguous() for tensor in tensors), y, conv_state_after, recurrent_state_after,
            qkv if active is None else active.view(torch.uint8), eps, G=groups, H=heads, K=width, V=out, W=taps, **block,
            WHOLE=whole, IN_PLACE=active is not None, num_warps=_warps(block["BK"] * columns),
        )  # fmt: skip
    if not whole:
        y = normed(y, gate, norm_weight, eps, qkv.dtype)
    return y, conv_state_after, recurrent_state_after


def _warps(elements: int) -> int:
    """At most 64 elements of the recurrent state per thread, 32 if several programs share a multiprocessor."""
    return 16 if elements > 1 << 14 else min(8, max(1, elements // 1024))


_operation = torch.library.custom_op(
    "qwen35moe_kernels::delta_net_step", _forward, mutates_args=(),
    schema="(Tensor qkv, Tensor gate, Tensor a, Tensor b, Tensor conv_state, Tensor recurrent_state, "
    "Tensor conv_weight, Tensor A_log, Tensor dt_bias, Tensor norm_weight, int groups, float eps) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip


def _in_place(
    qkv: Tensor, gate: Tensor, a: Tensor, b: Tensor, conv_state: Tensor, recurrent_state: Tensor, conv_weight: Tensor,
    A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor, groups: int, eps: float, active: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _forward(
        qkv, gate, a, b, conv_state, recurrent_state, conv_weight, A_log, dt_bias, norm_weight, groups, eps, active
    )[:2]


_operation_in_place = torch.library.custom_op(
    "qwen35moe_kernels::delta_net_step_in_place", _in_place, mutates_args=("recurrent_state",),
    schema="(Tensor qkv, Tensor gate, Tensor a, Tensor b, Tensor conv_state, Tensor(a!) recurrent_state, "
    "Tensor conv_weight, Tensor A_log, Tensor dt_bias, Tensor norm_weight, int groups, float eps, Tensor active) "
    "-> (Tensor, Tensor)",
)  # fmt: skip


@_operation_in_place.register_fake
def _shapes_in_place(
    qkv: Tensor, gate: Tensor, a: Tensor, b: Tensor, conv_state: Tensor, recurrent_state: Tensor, conv_weight: Tensor,
    A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor, groups: int, eps: float, active: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _shapes(
        qkv, gate, a, b, conv_state, recurrent_state, conv_weight, A_log, dt_bias, norm_weight, groups, eps
    )[:2]


@_operation.register_fake
def _shapes(
    qkv: Tensor, gate: Tensor, a: Tensor, b: Tensor, conv_state: Tensor, recurrent_state: Tensor, conv_weight: Tensor,
    A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor, groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, heads, _, out = recurrent_state.shape
    y, after = qkv.new_empty(rows, heads, out), qkv.new_empty(*qkv.shape, conv_weight.shape[-1] - 1)
    return y, after, recurrent_state.new_empty(recurrent_state.shape)


def register(register: Callable[..., None]) -> None:
    """Registers ahead of the definition, which composes the other operations."""
    register(
        "delta_net_step", "triton", delta_net_step, unsupported, before=runtime.place("fused_cpu"),
        missing=runtime.missing(), skips=SKIPS, differentiable=False, transforms=(),
    )  # fmt: skip
