"""Rotary position embedding in Triton, one launch for queries and keys, forward and backward.

query [B, T, H, K], key [B, T, G, K], cos and sin [B, T, R/2]; see `qwen35moe.ops.rope`. The transpose of a rotation is the
rotation by the negative angle, so that the backward is the same kernel. `norm_rotary` normalises each head first, forward only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen35moe_kernels import runtime

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 16384
_HEADS = 65535  # programs along the second axis of a grid


def unsupported(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """None, or the reason why this kernel cannot run this call."""
    if query.shape[2] + key.shape[2] > _HEADS:
        return f"{query.shape[2]} and {key.shape[2]} heads, one launch has {_HEADS}"
    if query.dtype != key.dtype:
        return f"query is {query.dtype}, key {key.dtype}"
    if runtime.needs_gradient(cos, sin):
        return "cos or sin requires a gradient"
    tensors = {"query": query, "key": key, "cos": cos, "sin": sin}
    return runtime.unsupported_device(**tensors) or runtime.unsupported_dtype(*_FLOATS, **tensors)


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both rotated, contiguous, in their dtype."""
    if torch.compiler.is_compiling() or runtime.needs_gradient(query, key):
        return _operation(query, key, cos, sin, False)
    return _rotated(query, key, cos, sin, False)


def unsupported_norm(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, query_weight: Tensor, key_weight: Tensor, *, eps: float
) -> str | None:  # fmt: skip
    """None, or the reason why the kernel of norm and rotation cannot run this call."""
    if query.shape[-1] > _WIDEST:
        return f"query has heads of {query.shape[-1]}, one program holds {_WIDEST}"
    weights = {"query_weight": query_weight, "key_weight": key_weight}
    return unsupported(query, key, cos, sin) or runtime.unsupported_device(query=query, **weights) or (
        runtime.unsupported_dtype(*_FLOATS, **weights)
    )


def norm_rotary(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, query_weight: Tensor, key_weight: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both normalised and rotated, contiguous, in their dtype."""
    run = _norm_operation if torch.compiler.is_compiling() else _norm_rotated
    return run(query, key, cos, sin, query_weight, key_weight, eps)


def _norm_rotated(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kernels = runtime.kernels("rotary_kernels")

    query, key, after = _operands(query, key)
    (B, T, H, K), G, half = query.shape, key.shape[2], cos.shape[-1]
    if B * T and H + G:
        rotation = (x.expand(B, -1, -1).contiguous() for x in (cos, sin))
        weights = query_weight.contiguous(), key_weight.contiguous()
        strides = *query.stride()[:3], *key.stride()[:3]
        with runtime.on_device_of(query):
            kernels.norm_rotary_kernel[(B * T, H + G)](
                query, key, *rotation, *weights, *after, T, H, G, K, half, eps, *strides, **_block(K, half)
            )
    return after


def _operands(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Both with contiguous heads, and empty tensors for the results."""
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    query_after, key_after = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key))
    return query, key, (query_after, key_after)


def _block(K: int, half: int) -> dict[str, int]:
    return {"BK": runtime.power_of_two(K), "BHALF": runtime.power_of_two(half), "num_warps": 1 if K <= 256 else 4}


def _rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    kernels = runtime.kernels("rotary_kernels")

    query, key, after = _operands(query, key)
    (B, T, H, K), G, half = query.shape, key.shape[2], cos.shape[-1]
    if B * T and H + G:
        cos, sin = (x.expand(B, -1, -1).contiguous() for x in (cos, sin))
        strides = *query.stride()[:3], *key.stride()[:3]
        with runtime.on_device_of(query):
            kernels.rotary_kernel[(B * T, H + G)](
                query, key, cos, sin, *after, T, H, G, K, half, -1.0 if back else 1.0, *strides, **_block(K, half)
            )
    return after


_operation = torch.library.custom_op(
    "qwen35moe_kernels::rotary", _rotated, mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor cos, Tensor sin, bool back) -> (Tensor, Tensor)",
)  # fmt: skip


@_operation.register_fake
def _shapes(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate(ctx: Any, d_query: Tensor, d_key: Tensor) -> tuple[Tensor | None, ...]:
    return *_operation(d_query, d_key, *ctx.saved_tensors, not ctx.back), None, None, None


_operation.register_autograd(_differentiate, setup_context=_save)


_norm_operation = torch.library.custom_op(
    "qwen35moe_kernels::norm_rotary", _norm_rotated, mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor cos, Tensor sin, Tensor query_weight, Tensor key_weight, float eps) -> "
    "(Tensor, Tensor)",
)  # fmt: skip


@_norm_operation.register_fake
def _norm_shapes(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, query_weight: Tensor, key_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return query.new_empty(query.shape), key.new_empty(key.shape)


def register(register: Callable[..., None]) -> None:
    """Registers ahead of the PyTorch forms."""
    missing, place = runtime.missing(), runtime.place("cpu")
    register("rotary", "triton", rotary, unsupported, before=place, missing=missing, transforms=())
    register(
        "norm_rotary", "triton", norm_rotary, unsupported_norm, before=runtime.place("torch"), missing=missing,
        differentiable=False, transforms=(),
    )  # fmt: skip
