"""Causal attention through torch's scaled_dot_product_attention, on any device. Contract in `ops.attention`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.backends.values import host_values
from qwen35moe.ops.attention import attention, causal_mask
from qwen35moe.ops.cuda.attention import cuda_attention
from qwen35moe.ops.precision import wide_dtype


@attention.implementation("torch", skips=("scores",), transforms=(), double_backward=False)
def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, starts: int | Tensor = 0,
    cu_seqlens: Tensor | None = None, dropout: float = 0.0,
) -> Tensor:
    """One call of SDPA per packed document (under torch.compile, where their bounds are not known, one with a mask), else one
    call; for one new token without a mask and without repeated keys."""
    if cu_seqlens is not None and not torch.compiler.is_compiling():
        documents = [
            sdpa_attention(query[:, start:end], key[:, start:end], value[:, start:end], scale=scale, dropout=dropout)
            for start, end in pairwise(host_values(cu_seqlens))
            if end > start
        ]
        return torch.cat(documents, dim=1) if documents else query.new_zeros(*query.shape[:3], value.shape[-1])
    if query.is_cuda and cu_seqlens is None:
        return cuda_attention(query, key, value, scale=scale, starts=starts, dropout=dropout)
    tokens, positions, heads = query.shape[1], key.shape[1], query.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if tokens == 1 and cu_seqlens is None and not isinstance(starts, Tensor) and positions == starts + 1:
        # One new token attends to every key: the query heads of a key head become its query positions.
        q = q.reshape(q.shape[0], key.shape[2], -1, q.shape[-1])
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, dropout_p=dropout)
        return out.reshape(q.shape[0], 1, heads, -1)
    square = False
    if cu_seqlens is None and isinstance(starts, int) and starts == 0 and positions == tokens:
        square = True  # with symbolic lengths (torch.compile) a branch is a bool, the condition itself is not
    mask = None if square else causal_mask(tokens, positions, query.device, starts, cu_seqlens)
    options = {"attn_mask": mask, "is_causal": square, "scale": scale, "enable_gqa": heads != key.shape[2]}
    if dropout:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **options).transpose(1, 2)
    return sdpa(q, k, v, **options).transpose(1, 2)


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention with float32 gradients in half precision on a CPU, where torch's backward sums those of
    keys and values over the queries in their dtype: off by 5 % at 16,000 tokens, and ten times slower than in float32."""
    inputs = (query, key, value)
    low = query.device.type == "cpu" and query.dtype != wide_dtype(query)
    if low and torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return _Attention.apply(*inputs, attn_mask, is_causal, scale, enable_gqa)  # pyright: ignore[reportReturnType]
    return F.scaled_dot_product_attention(
        *inputs, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )


class _Attention(torch.autograd.Function):
    """SDPA in the inputs' dtype; the backward computes it again in float32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *options: Any) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.set_materialize_grads(False)
        ctx.options = dict(zip(("is_causal", "scale", "enable_gqa"), options, strict=True))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **ctx.options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return (None,) * 7
        *inputs, mask = ctx.saved_tensors
        with torch.enable_grad():
            needs = ctx.needs_input_grad[:3]
            wide = [x.detach().to(wide_dtype(x)).requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
            out = F.scaled_dot_product_attention(*wide, attn_mask=mask, **ctx.options)
        wanted = [x for x in wide if x.requires_grad]
        gradients = iter(torch.autograd.grad(out, wanted, grads[0].to(out.dtype)))
        narrow = (next(gradients).to(x.dtype) if w.requires_grad else None for x, w in zip(inputs, wide, strict=True))
        return *narrow, None, None, None, None
