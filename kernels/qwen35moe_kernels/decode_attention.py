"""Attention of one query token per row over a cache in Triton, for rows of any lengths, which only the device needs to have.

    y = softmax(scale q k^T, over positions 0 ... starts[row]) v

The positions are divided among programs, each of which keeps a maximum, a sum and a weighted sum of values; a second launch
joins them (Dao et al. 2023, "Flash-Decoding for long-context inference"). The query heads of a key head share its keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qwen35moe_kernels import runtime

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 256
_BLOCK = 32  # positions at a time; two blocks of keys and values in flight fit 64 KB
_PROGRAMS, _SMALLEST, _PARTS = 264, 128, 64  # programs that fill a GPU; positions of a part, at least; parts, at most


def unsupported(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, starts: int | Tensor = 0,
    cu_seqlens: Tensor | None = None, dropout: float = 0.0,
) -> str | None:
    """None, or the reason why this kernel cannot run this call."""
    if query.shape[1] != 1 or not isinstance(starts, Tensor) or cu_seqlens is not None:
        return "it is for one token per row, with the rows' positions (starts) on the device"
    if dropout:
        return f"dropout {dropout}"
    if query.shape[2] % key.shape[2]:
        return f"query has {query.shape[2]} heads, not a multiple of the {key.shape[2]} heads of key"
    if max(query.shape[-1], value.shape[-1]) > _WIDEST:
        return f"heads of {query.shape[-1]} and {value.shape[-1]}, the kernel takes up to {_WIDEST}"
    if key.shape[1] == 0 or key.shape[2] > 65535:
        return f"key {list(key.shape)}"
    if not query.dtype == key.dtype == value.dtype:
        return f"query is {query.dtype}, key {key.dtype}, value {value.dtype}"
    tensors = {"query": query, "key": key, "value": value}
    return runtime.unsupported_device(**tensors, starts=starts) or runtime.unsupported_dtype(*_FLOATS, **tensors)


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, starts: int | Tensor = 0,
    cu_seqlens: Tensor | None = None, dropout: float = 0.0,
) -> Tensor:
    """query [B, 1, H, K], key [B, P, G, K], value [B, P, G, V], starts [B]; returns [B, 1, H, V]."""
    assert isinstance(starts, Tensor)
    return (_operation if torch.compiler.is_compiling() else _forward)(query, key, value, starts, scale)


def _chunk(positions: int, programs: int) -> int:
    """Positions of a part: so many that the parts of all rows and key heads fill a GPU, a power of two."""
    parts = max(1, min(_PARTS, _PROGRAMS // programs))
    return max(_SMALLEST, runtime.power_of_two(runtime.parts(positions, parts)))


def _forward(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float) -> Tensor:
    kernels = runtime.kernels("decode_attention_kernels")

    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    (B, _, H, K), (P, G), V = query.shape, key.shape[1:3], value.shape[-1]
    out = torch.empty(B, 1, H, V, dtype=query.dtype, device=query.device)
    if not B:
        return out
    chunk = _chunk(P, B * G)
    parts = runtime.parts(P, chunk)
    partial, sums = out, out
    if parts > 1:
        partial = torch.empty(B, H, parts, V, dtype=torch.float32, device=query.device)
        sums = torch.empty(B, H, parts, 2, dtype=torch.float32, device=query.device)
    blocks = {"BR": max(16, runtime.power_of_two(H // G)), "BK": max(16, runtime.power_of_two(K))}
    wide = max(16, runtime.power_of_two(V))
    with runtime.on_device_of(query):
        kernels.part_kernel[(B, G, parts)](
            query, key, value, starts.contiguous(), partial, sums, scale * math.log2(math.e), P, query.stride(0),
            query.stride(2), *key.stride()[:3], *value.stride()[:3], R=H // G, K=K, V=V, **blocks, BV=wide, BN=_BLOCK,
            CHUNK=chunk, ONE=parts == 1, num_warps=4, num_stages=2,
        )  # fmt: skip
        if parts > 1:
            kernels.join_kernel[(B * H,)](
                partial, sums, out, parts, V=V, BV=wide, BP=runtime.power_of_two(parts), num_warps=4
            )
    return out


_operation = torch.library.custom_op(
    "qwen35moe_kernels::decode_attention", _forward, mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor starts, float scale) -> Tensor",
)  # fmt: skip


@_operation.register_fake
def _shapes(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[-1])


def register(register: Callable[..., None]) -> None:
    """Registers ahead of the PyTorch forms."""
    register(
        "attention", "triton", attention, unsupported, before=runtime.place("bf16_blocks"), missing=runtime.missing(),
        skips=("scores",), differentiable=False, transforms=(),
    )  # fmt: skip
