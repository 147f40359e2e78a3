"""The rotation of `ops.rope`, a block of tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen35moe.ops.precision import wide_dtype
from qwen35moe.ops.rope import rotary

_BLOCK = 1 << 17  # numbers rotated at once: with their temporaries they stay in cache
_FEW = 64  # tokens, below which the definition's temporaries stay in cache as well


def _few_tokens(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    return f"{query.shape[1]} tokens are fewer than {_FEW}" if query.shape[1] < _FEW else None


@rotary.implementation("cpu", _few_tokens, device="cpu", compiles=False, differentiable=False, transforms=())
def rotary_cpu(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotary` without a backward. In memory the results are [B, H, T, K], the order in which attention reads them."""
    return _rotated_by_blocks(query, cos, sin), _rotated_by_blocks(key, cos, sin)


def _rotated_by_blocks(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (batch, tokens, heads, width), half = x.shape, cos.shape[-1]
    dtype = wide_dtype(x)
    cos, sin = (part[:, :, None].to(dtype).expand(batch, -1, -1, -1) for part in (cos, sin))
    out = torch.empty(batch, heads, tokens, width, dtype=x.dtype, device=x.device).transpose(1, 2)
    out[..., 2 * half :] = x[..., 2 * half :]
    step = max(1, _BLOCK // (batch * heads * 2 * half))
    wide, rotated = torch.empty(2, batch, min(step, tokens), heads, 2 * half, dtype=dtype, device=x.device)
    for start in range(0, tokens, step):
        block = slice(start, min(start + step, tokens))
        count = block.stop - start
        c, s = cos[:, block], sin[:, block]
        a, b = wide[:, :count].copy_(x[:, block, :, : 2 * half]).chunk(2, dim=-1)
        first, second = rotated[:, :count].chunk(2, dim=-1)
        torch.mul(a, c, out=first).addcmul_(b, s, value=-1)
        torch.mul(b, c, out=second).addcmul_(a, s)
        out[:, block, :, : 2 * half] = rotated[:, :count]
    return out
