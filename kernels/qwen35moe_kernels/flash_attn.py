"""Adapter to flash-attn 2 (>= 2.6): `flash_attn_func`, `flash_attn_varlen_func`, `flash_attn_with_kvcache`.

Its causal mask is aligned to the last key: of T queries and S keys, query i attends to keys 0 ... S - T + i. This equals our
mask if every row starts at position S - T. Rows that start at different positions use `flash_attn_with_kvcache`, which takes
each row's number of keys and supports neither a backward nor dropout. Packed documents and the frames of images and videos
use `flash_attn_varlen_func`. Its contract, line by line: docs/reference/adapters.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen35moe_kernels import runtime

_FLOATS = (torch.float16, torch.bfloat16)
_WIDEST, _OLDEST = 256, (2, 6)


def attention_unsupported(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, starts: int | Tensor = 0,
    cu_seqlens: Tensor | None = None, dropout: float = 0.0,
) -> str | None:
    """None, or the reason why flash-attn cannot run this call."""
    tokens, heads = query.shape[1:3]
    positions, groups = key.shape[1:3]
    if heads % groups:
        return f"query has {heads} heads, not a multiple of the {groups} heads of key"
    if cu_seqlens is not None:
        if query.shape[0] != 1 or positions != tokens:
            return f"cu_seqlens: query {list(query.shape)} and key {list(key.shape)} are not one row of documents"
    elif isinstance(starts, Tensor):
        if dropout:
            return f"dropout {dropout}: not supported for rows that start at different positions (starts)"
        if runtime.needs_gradient(query, key, value):
            return "starts: rows that start at different positions have no backward (flash_attn_with_kvcache)"
    elif not 0 <= starts <= positions - tokens:
        return f"starts {starts}: {tokens} more tokens do not fit into the {positions} positions of key"
    common = _unsupported_tensors(query, key, value, cu_seqlens)
    return common or _unsupported_backward(query, key, value, dropout)


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, starts: int | Tensor = 0,
    cu_seqlens: Tensor | None = None, dropout: float = 0.0,
) -> Tensor:
    """query [B, T, H, K], key and value [B, P, G, K]; returns [B, T, H, K], as `attention` defines it."""
    flash_attn: Any = importlib.import_module("flash_attn")
    tokens = query.shape[1]
    query, key, value = runtime.aligned(query), runtime.aligned(key), runtime.aligned(value)
    options = {"softmax_scale": scale, "causal": True}
    if cu_seqlens is not None:
        return _varlen(query[0], key[0], value[0], cu_seqlens, dropout_p=dropout, **options)[None]
    plain = not dropout and not runtime.needs_gradient(query, key, value)
    if isinstance(starts, Tensor):
        lengths = (starts + tokens).to(device=query.device, dtype=torch.int32)
        return flash_attn.flash_attn_with_kvcache(query, key, value, cache_seqlens=lengths, **options)
    if plain and starts:  # few queries and many keys: it splits the keys among programs
        return flash_attn.flash_attn_with_kvcache(query, key, value, cache_seqlens=starts + tokens, **options)
    key, value = key[:, : starts + tokens], value[:, : starts + tokens]
    deterministic = torch.are_deterministic_algorithms_enabled()
    out = flash_attn.flash_attn_func(query, key, value, dropout_p=dropout, deterministic=deterministic, **options)
    return runtime.align_gradient(out)


def vision_unsupported(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, scale: float) -> str | None:
    """None, or the reason why flash-attn cannot run this call."""
    return _unsupported_tensors(query, key, value, cu_seqlens)


def vision_attention(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, scale: float) -> Tensor:
    """query, key, value [N, H, K]; a patch attends to its own frame, as `vision_attention` defines it."""
    query, key, value = runtime.aligned(query), runtime.aligned(key), runtime.aligned(value)
    return _varlen(query, key, value, cu_seqlens, softmax_scale=scale, causal=False)


def _varlen(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, **options: Any) -> Tensor:
    """Attention within packed sequences."""
    flash_attn: Any = importlib.import_module("flash_attn")
    bounds, longest = runtime.varlen_bounds(cu_seqlens, query.device)
    deterministic = torch.are_deterministic_algorithms_enabled()
    out = flash_attn.flash_attn_varlen_func(
        query, key, value, bounds, bounds, longest, longest, deterministic=deterministic, **options
    )
    return runtime.align_gradient(out)


def _unsupported_tensors(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None) -> str | None:
    width = query.shape[-1]
    if width > _WIDEST:
        return f"query has heads of {width}, flash_attn takes up to {_WIDEST}"
    if width % 8:
        return f"query has heads of {width}, flash_attn takes multiples of 8"
    if value.shape[-1] != width:
        return f"value has heads of {value.shape[-1]} and query of {width}, flash_attn takes one width"
    if not query.numel():
        return f"query {list(query.shape)} is empty"
    if torch.compiler.is_compiling():
        return "a graph is being compiled, and flash_attn is not part of it"
    if cu_seqlens is not None and cu_seqlens.shape[0] < 2:
        return "cu_seqlens holds no sequence"
    if query.dtype != key.dtype or query.dtype != value.dtype:
        return f"query is {query.dtype}, key {key.dtype}, value {value.dtype}: flash_attn takes one dtype"
    tensors = {"query": query, "key": key, "value": value}
    return (
        runtime.unsupported_dtype(*_FLOATS, **tensors)
        or runtime.unsupported_cuda(**tensors)
        or runtime.unsupported_capability("flash_attn", query, (8, 0))
    )


def _unsupported_backward(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> str | None:
    """The backward of wide heads with dropout needs the shared memory of an A100, H100 or B200."""
    if dropout and query.shape[-1] > 192 and runtime.needs_gradient(query, key, value):
        capability = runtime.capability(query)
        if capability is not None and capability not in ((8, 0), (9, 0), (10, 0)):
            return f"dropout {dropout}: heads of {query.shape[-1]} have no backward with dropout on capability {capability}"
    return None


def _missing() -> str | None:
    """The distribution is checked as well: flash-attn 4 alone installs a folder flash_attn with other functions."""
    how = "pip install 'flash-attn>=2.6' --no-build-isolation"
    return runtime.package_missing("flash_attn", how, distribution="flash-attn", oldest=_OLDEST)


def register(register: Callable[..., None]) -> None:
    """Registers ahead of the PyTorch forms."""
    options = {"missing": _missing(), **runtime.FIRST_ORDER}
    skips = ("scores",)
    register("attention", "flash_attn", attention, attention_unsupported, before="bf16_blocks", skips=skips, **options)
    register("vision_attention", "flash_attn", vision_attention, vision_unsupported, before="torch", **options)
