"""Causal attention over shared key heads, and who may see whom.

    output = softmax(scale * query key^T, over the visible keys) value

Vaswani et al. 2017; Ainslie et al. 2023 (grouped queries: key head g serves query heads g H/G ... (g+1) H/G - 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe import backends
from qwen35moe.ops.precision import wide_dtype


@dataclass(frozen=True)
class Visibility:
    """Token i of row b sees the keys in slots 0 ... starts[b] + i of its row, or of its document.

    starts: an int where all rows begin at the same slot, else a tensor [B]. cu_seqlens [documents + 1]: packed
    documents in one row whose keys are the tokens themselves.
    """

    starts: int | Tensor = 0
    cu_seqlens: Tensor | None = None

    def mask(self, tokens: int, slots: int, device: torch.device) -> Tensor:
        """True where a query [tokens] sees a key [slots]: [1 or B, 1, T, S]."""
        query = torch.arange(tokens, device=device)
        key = torch.arange(slots, device=device)
        if self.cu_seqlens is not None:
            document = torch.bucketize(key, self.cu_seqlens[1:].to(device), right=True)
            return ((document[:, None] == document) & (key <= query[:, None]))[None, None]
        starts = self.starts if isinstance(self.starts, Tensor) else torch.full((1,), self.starts, device=device)
        return key <= (starts.to(device)[:, None] + query)[:, None, :, None]


def attention_weights(query: Tensor, key: Tensor, *, scale: float, visible: Visibility) -> Tensor:
    """softmax(scale * query key^T) over the visible keys: [B, H, T, S], float32 at least.

    query [B, T, H, K], key [B, S, G, K].
    """
    dtype = wide_dtype(query, key)
    repeats = query.shape[2] // key.shape[2]
    scores = torch.einsum("bthk,bshk->bhts", query.to(dtype), key.to(dtype).repeat_interleave(repeats, dim=2)) * scale
    mask = visible.mask(query.shape[1], key.shape[1], query.device)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1)


def eager_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, visible: Visibility, dropout: float = 0.0
) -> Tensor:
    """The definition. query [B, T, H, K], key [B, S, G, K], value [B, S, G, V]; returns [B, T, H, V]."""
    weights = F.dropout(attention_weights(query, key, scale=scale, visible=visible), dropout)
    return weighted_values(weights, value).to(query.dtype)


def weighted_values(weights: Tensor, value: Tensor) -> Tensor:
    """[B, H, T, S] and [B, S, G, V] to [B, T, H, V], in the dtype of the weights."""
    repeats = weights.shape[1] // value.shape[2]
    return torch.einsum("bhts,bshv->bthv", weights, value.to(weights.dtype).repeat_interleave(repeats, dim=2))


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, visible: Visibility, dropout: float = 0.0
) -> Tensor:
    """The same through torch's scaled_dot_product_attention. Arguments and result as in the definition."""
    if visible.cu_seqlens is not None:
        bounds = visible.cu_seqlens.tolist()
        parts = [
            sdpa_attention(query[:, a:b], key[:, a:b], value[:, a:b], scale=scale, visible=Visibility(), dropout=dropout)
            for a, b in pairwise(bounds)
            if b > a
        ]
        return torch.cat(parts, dim=1)
    tokens, slots, heads = query.shape[1], key.shape[1], query.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    uniform = not isinstance(visible.starts, Tensor)
    if tokens == 1 and uniform and slots == visible.starts + 1:
        # One new token sees every key: the query heads of a key head become its queries, and no key is repeated.
        q = q.reshape(q.shape[0], key.shape[2], -1, q.shape[-1])
        out = F.scaled_dot_product_attention(q, k, v, scale=scale, dropout_p=dropout)
        return out.reshape(q.shape[0], 1, heads, -1)
    square = isinstance(visible.starts, int) and visible.starts == 0 and slots == tokens
    mask = None if square else visible.mask(tokens, slots, query.device)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=square, scale=scale, dropout_p=dropout, enable_gqa=heads != key.shape[2]
    )
    return out.transpose(1, 2)


def _cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Iterator[tuple[tuple, dict]]:
    sizes = [(2, 7, 7, 6, 3, 16, 0), (2, 3, 9, 4, 2, 8, 6), (3, 1, 12, 4, 1, 24, 11), (1, 10, 10, 2, 2, 8, 0)]
    for number, (batch, tokens, slots, heads, groups, width, start) in enumerate(sizes):
        shapes = ((tokens, heads), (slots, groups), (slots, groups))
        tensors = [torch.randn(batch, *s, width, generator=generator, dtype=torch.float64) for s in shapes]
        bounds = torch.tensor([0, 1, 4, 10], device=device) if number == 3 else None
        ragged = torch.tensor([start, start - 2], device=device) if number == 1 else start
        visible = Visibility(ragged, bounds)
        yield tuple(x.to(device, dtype) for x in tensors), {"scale": width**-0.5, "visible": visible}


backends.register("attention", "torch", sdpa_attention, skips=("scores",))
backends.register("attention", "eager", eager_attention)
backends.add_cases("attention", eager_attention, _cases)
