"""Causal attention over shared key heads.

    output = softmax(scale * query key^T, over the visible keys) value

Vaswani et al. 2017; Ainslie et al. 2023 (grouped queries: key head g serves query heads g H/G ... (g+1) H/G - 1).

Query i of row b attends to the keys at positions 0 ... starts[b] + i of its row. starts is an int if all rows start at the same
position, else a tensor [B]. With cu_seqlens [documents + 1], the row consists of packed documents without a cache, and query i
attends to the keys of its document up to i.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.backends import operation
from qwen35moe.ops.precision import wide_dtype


@operation(name="eager")
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, starts: int | Tensor = 0,
    cu_seqlens: Tensor | None = None, dropout: float = 0.0,
) -> Tensor:
    """softmax(scale * query key^T) value. query [B, T, H, K], key [B, P, G, K], value [B, P, G, V]; returns [B, T, H, V]."""
    weights = attention_weights(query, key, scale=scale, starts=starts, cu_seqlens=cu_seqlens)
    return weighted_values(F.dropout(weights, dropout), value).to(query.dtype)


@operation
def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """x * sigmoid(gate), the output gate of Gated Attention. x, gate [..., V]; returns [..., V]."""
    return x * gate.sigmoid()


def attention_weights(
    query: Tensor, key: Tensor, *, scale: float, starts: int | Tensor = 0, cu_seqlens: Tensor | None = None
) -> Tensor:
    """softmax(scale * query key^T) over the visible keys: [B, H, T, P], float32 at least.

    query [B, T, H, K], key [B, P, G, K].
    """
    dtype = wide_dtype(query, key)
    repeats = query.shape[2] // key.shape[2]
    scores = torch.einsum("bthk,bphk->bhtp", query.to(dtype), key.to(dtype).repeat_interleave(repeats, dim=2)) * scale
    mask = causal_mask(query.shape[1], key.shape[1], query.device, starts, cu_seqlens)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1)


def weighted_values(weights: Tensor, value: Tensor) -> Tensor:
    """[B, H, T, P] and [B, P, G, V] to [B, T, H, V], in the dtype of the weights."""
    repeats = weights.shape[1] // value.shape[2]
    return torch.einsum("bhtp,bphv->bthv", weights, value.to(weights.dtype).repeat_interleave(repeats, dim=2))


def causal_mask(
    tokens: int, positions: int, device: torch.device, starts: int | Tensor = 0, cu_seqlens: Tensor | None = None
) -> Tensor:
    """True where a query attends to a key: [1 or B, 1, T, P]."""
    query = torch.arange(tokens, device=device)
    key = torch.arange(positions, device=device)
    if cu_seqlens is not None:
        document = torch.bucketize(key, cu_seqlens[1:].to(device), right=True)
        return ((document[:, None] == document) & (key <= query[:, None]))[None, None]
    starts = starts if isinstance(starts, Tensor) else torch.full((1,), starts, device=device)
    return key <= (starts.to(device)[:, None] + query)[:, None, :, None]
