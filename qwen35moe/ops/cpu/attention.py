"""Causal attention through torch's scaled_dot_product_attention, on any device. Contract in `ops.attention`."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.ops.attention import attention, causal_mask


@attention.implementation("torch", skips=("scores",))
def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, starts: int | Tensor = 0,
    cu_seqlens: Tensor | None = None, dropout: float = 0.0,
) -> Tensor:
    """One call of SDPA per packed document, else one call; for one new token without a mask and without repeated keys."""
    if cu_seqlens is not None:
        documents = [
            sdpa_attention(query[:, start:end], key[:, start:end], value[:, start:end], scale=scale, dropout=dropout)
            for start, end in pairwise(cu_seqlens.tolist())
            if end > start
        ]
        return torch.cat(documents, dim=1)
    tokens, positions, heads = query.shape[1], key.shape[1], query.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if tokens == 1 and not isinstance(starts, Tensor) and positions == starts + 1:
        # One new token attends to every key: the query heads of a key head become its query positions.
        q = q.reshape(q.shape[0], key.shape[2], -1, q.shape[-1])
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, dropout_p=dropout)
        return out.reshape(q.shape[0], 1, heads, -1)
    square = isinstance(starts, int) and starts == 0 and positions == tokens
    mask = None if square else causal_mask(tokens, positions, query.device, starts)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=square, scale=scale, dropout_p=dropout, enable_gqa=heads != key.shape[2]
    )
    return out.transpose(1, 2)
