"""The router in Triton: softmax, top-k and normalisation in one launch behind torch's product.

hidden [N, D], weight [E, D]; logits [N, E], weights [N, k] in hidden's dtype, indices [N, k] int64: see
`qwen35moe.ops.experts`. The normalised probabilities of the chosen experts are the softmax of their logits, so that w_j depends
on those alone:

    dz_{e_j} = w_j (dw_j - sum_i w_i dw_i)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe_kernels import runtime

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ELEMENTS = 2048  # logits in one program
_MOST = 32  # experts per token: the choice is a loop


def unsupported(hidden: Tensor, weight: Tensor, *, top_k: int) -> str | None:
    """None, or the reason why this kernel cannot run this call."""
    if top_k > _MOST:
        return f"{top_k} experts per token, the limit is {_MOST}"
    if top_k > weight.shape[0]:
        return f"top_k={top_k} of {weight.shape[0]} experts"
    return runtime.unsupported_device(hidden=hidden, weight=weight) or runtime.unsupported_dtype(
        *_FLOATS, hidden=hidden, weight=weight
    )


def router(hidden: Tensor, weight: Tensor, *, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, weights, indices)."""
    logits = F.linear(hidden, weight)
    if torch.compiler.is_compiling() or runtime.needs_gradient(logits):
        weights, indices = _operation(logits, top_k)
    else:
        weights, indices = _choose(logits, top_k)
    return logits, weights, indices


def _choose(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    kernels = runtime.kernels("router_kernels")

    N, E = logits.shape
    weights = torch.empty(N, top_k, dtype=logits.dtype, device=logits.device)
    indices = torch.empty(N, top_k, dtype=torch.int64, device=logits.device)
    if N:
        width = runtime.power_of_two(E)
        block = min(max(1, _ELEMENTS // width), runtime.power_of_two(N))
        shape = {"TOP_K": top_k, "BN": block, "BE": width, "BK": runtime.power_of_two(top_k)}
        with runtime.on_device_of(logits):
            kernels.choose_kernel[(runtime.parts(N, block),)](logits.contiguous(), indices, weights, N, E, **shape)
    return weights, indices


def _backward(dw: Tensor, weights: Tensor, indices: Tensor, num_experts: int) -> Tensor:
    w, dw = weights.float(), dw.float()
    chosen = w * (dw - (w * dw).sum(-1, keepdim=True))
    return weights.new_zeros(len(weights), num_experts).scatter(1, indices, chosen.to(weights.dtype))


_operation = torch.library.custom_op(
    "qwen35moe_kernels::router", _choose, mutates_args=(), schema="(Tensor logits, int top_k) -> (Tensor, Tensor)"
)


@_operation.register_fake
def _shapes(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(logits), top_k), logits.new_empty(len(logits), top_k, dtype=torch.int64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.num_experts = inputs[0].shape[1]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output)


def _differentiate(ctx: Any, dw: Tensor, _: Tensor | None) -> tuple[Tensor | None, None]:
    weights, indices = ctx.saved_tensors
    return _backward(dw, weights, indices, ctx.num_experts), None


_operation.register_autograd(_differentiate, setup_context=_save)


def register(register: Callable[..., None]) -> None:
    """Registers ahead of the PyTorch form."""
    missing, place = runtime.missing(), runtime.place("torch")
    register("router", "triton", router, unsupported, before=place, missing=missing, **runtime.FIRST_ORDER)
