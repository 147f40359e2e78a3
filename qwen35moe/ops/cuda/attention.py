"""Causal attention on a GPU through torch's scaled_dot_product_attention. Contract in `ops.attention`.

torch has three kernels there, and takes the last, which materialises the scores in float32, where the others do not support the
arguments:

    flash               half precision, grouped heads, no mask; causal, aligned to the first or to the last key
    memory-efficient    any dtype, a mask with strides that are multiples of 8 elements, no grouped heads
    math                everything

So a mask never meets grouped heads here: the query heads of a key head become query positions (one new token), or keys and
values are repeated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ALIGNED = 8  # elements: the strides of a mask in the memory-efficient kernel


def cuda_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, starts: int | Tensor = 0, dropout: float = 0.0
) -> Tensor:
    """`ops.attention` without packed documents. Rows that start together need no mask where the flash kernel runs; a compiled
    graph, in which the lengths may be symbols, has one unless no key is before the queries."""
    tokens, heads, groups = query.shape[1], query.shape[2], key.shape[2]
    compiling, together = torch.compiler.is_compiling(), isinstance(starts, int)
    if together and not compiling:
        key, value = key[:, : starts + tokens], value[:, : starts + tokens]
    causal = False
    if together and starts == 0 and key.shape[1] == tokens:
        causal = True  # with symbolic lengths (torch.compile) a branch is a bool, the condition itself is not
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if tokens == 1:
        mask = None if causal or (together and not compiling) else additive_mask(1, key.shape[1], starts, query)
        q = q.reshape(q.shape[0], groups, heads // groups, q.shape[-1])  # the heads of a key head become its query positions
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
        return out.reshape(q.shape[0], 1, heads, -1)
    if together and not compiling and not causal and _flash_runs(q, k, v, dropout):
        # F.scaled_dot_product_attention has no argument for a causal mask that is aligned to the last key; this kernel has it.
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(q, k, v, dropout, True, return_debug_mask=False, scale=scale)[0].transpose(1, 2)
    mask = None if causal else additive_mask(tokens, key.shape[1], starts, query)
    grouped = heads != groups and mask is None and _flash_runs(q, k, v, dropout)
    if heads != groups and not grouped:
        k, v = repeated(k, heads), repeated(v, heads)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def additive_mask(tokens: int, positions: int, starts: int | Tensor, query: Tensor) -> Tensor:
    """0 where a query attends to a key, else -inf: [1 or B, 1, T, P] in the dtype of `query`, as a part of a wider tensor whose
    rows begin at multiples of 8 elements."""
    key = torch.arange(-(-positions // _ALIGNED) * _ALIGNED, device=query.device)
    last = starts[:, None] if isinstance(starts, Tensor) else torch.full((1, 1), starts, device=query.device)
    if tokens > 1:
        last = last + torch.arange(tokens, device=query.device)
    hidden = key > last[:, None, :, None]  # the opposite of `causal_mask`, in fewer launches
    mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(hidden, float("-inf"))
    return mask[..., :positions]


def repeated(x: Tensor, heads: int) -> Tensor:
    """Keys or values [B, G, P, K], each head as often as query heads use it: [B, H, P, K]."""
    batch, groups, positions, width = x.shape
    return x[:, :, None].expand(-1, -1, heads // groups, -1, -1).reshape(batch, heads, positions, width)


def _flash_runs(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether torch's flash kernel takes these tensors [B, H or G, tokens, K]; in a compiled graph, by their dtype."""
    if query.dtype not in (torch.bfloat16, torch.float16) or query.shape[-1] % 8 or value.shape[-1] != query.shape[-1]:
        return False
    arguments = torch.backends.cuda.SDPAParams(query, key, value, None, dropout, False, True)
    return torch.compiler.is_compiling() or torch.backends.cuda.can_use_flash_attention(arguments)
