"""The embedding of tokens: rows of a table.

    y_t = W[token_t]          dW[v] = sum of dy_t over the tokens t with token_t = v
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.ops.precision import wide_dtype


def embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """Rows of weight [vocabulary, D] for ids [...]: [..., D]. The row `padding_idx` gets no gradient, as in nn.Embedding.

    The gradient of a row is summed over its tokens in float32 at least: in bfloat16, in which torch sums on a CPU, a token that
    occurs 4000 times gets a tenth of its gradient.
    """
    low = weight.dtype != wide_dtype(weight) and weight.device.type == "cpu"
    if low and weight.requires_grad and torch.is_grad_enabled():
        return _Embedding.apply(ids, weight, padding_idx)  # pyright: ignore[reportReturnType]
    return F.embedding(ids, weight, padding_idx)


class _Embedding(torch.autograd.Function):
    """Linear in the weight: every derivative is made of this function and its transpose, which autograd differentiates."""

    @staticmethod
    def forward(ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        return F.embedding(ids, weight, padding_idx)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int | None], output: Tensor) -> None:
        ids, weight, ctx.padding_idx = inputs
        ctx.save_for_backward(ids)
        ctx.save_for_forward(ids)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (ids,) = ctx.saved_tensors
        grad = grads[0].to(wide_dtype(grads[0]))
        if ctx.padding_idx is not None:
            grad = grad.masked_fill((ids == ctx.padding_idx % ctx.shape[0])[..., None], 0)
        total = grad.new_zeros(ctx.shape).index_add(0, ids.reshape(-1), grad.reshape(-1, ctx.shape[1]))
        return None, total.to(ctx.dtype), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return F.embedding(ctx.saved_tensors[0], tangents[1])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], ids: Tensor, weight: Tensor, padding_idx: int | None) -> tuple[Tensor, int]:
        if in_dims[1] is None:
            return embedding(ids, weight, padding_idx), in_dims[0]
        tables = weight.movedim(in_dims[1], 0)
        size, vocabulary, _ = tables.shape
        ids = ids.expand(size, *ids.shape) if in_dims[0] is None else ids.movedim(in_dims[0], 0)
        first = torch.arange(size, device=ids.device).view(-1, *[1] * (ids.dim() - 1)) * vocabulary
        if padding_idx is not None:  # that row of every table is a constant
            constant = tables.detach()[:, padding_idx % vocabulary, None]
            tables = torch.cat([tables[:, : padding_idx % vocabulary], constant, tables[:, padding_idx % vocabulary + 1 :]], 1)
        return embedding(ids + first, tables.flatten(0, 1)), 0
