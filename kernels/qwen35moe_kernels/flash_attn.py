"""Adapter to flash-attn 2 (>= 2.6): `flash_attn_func`, `flash_attn_varlen_func`, `flash_attn_with_kvcache`.

Its causal mask ends at the last key: token i of T sees keys 0 ... S - T + i. That is ours where every row begins at slot
S - T. Rows that begin at different slots go through `flash_attn_with_kvcache`, which takes each row's number of keys
and has neither a backward nor dropout. Packed documents and frames of images go through `flash_attn_varlen_func`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
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
    """Why flash-attn cannot run this call, or None."""
    tokens, heads = query.shape[1:3]
    slots, groups = key.shape[1:3]
    if heads % groups:
        return f"query has {heads} heads, no multiple of the {groups} of key"
    if cu_seqlens is not None:
        if query.shape[0] != 1 or slots != tokens:
            return f"cu_seqlens: query {list(query.shape)} and key {list(key.shape)} are not one row of documents"
    elif isinstance(starts, Tensor):
        if dropout:
            return f"dropout {dropout}: rows that begin at different slots (starts) go without it"
        if runtime.needs_gradient(query, key, value):
            return "starts: rows that begin at different slots have no backward (flash_attn_with_kvcache)"
    elif not 0 <= starts <= slots - tokens:
        return f"starts {starts}: {tokens} tokens from there do not fit the {slots} slots of key"
    return _common(query, key, value, cu_seqlens) or _backward_objection(query, key, value, dropout)


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, starts: int | Tensor = 0,
    cu_seqlens: Tensor | None = None, dropout: float = 0.0,
) -> Tensor:
    """query [B, T, H, K], key and value [B, S, G, K]; returns [B, T, H, K]. The contract of `attention`."""
    flash_attn: Any = importlib.import_module("flash_attn")
    tokens = query.shape[1]
    options = {"softmax_scale": scale, "causal": True}
    if cu_seqlens is not None:
        return _varlen(query[0], key[0], value[0], cu_seqlens, dropout_p=dropout, **options)[None]
    plain = not dropout and not runtime.needs_gradient(query, key, value)
    if isinstance(starts, Tensor):
        seen = (starts + tokens).to(device=query.device, dtype=torch.int32)
        return flash_attn.flash_attn_with_kvcache(query, key, value, cache_seqlens=seen, **options)
    if plain and starts:  # a few tokens against many keys: it divides the keys among programs
        return flash_attn.flash_attn_with_kvcache(query, key, value, cache_seqlens=starts + tokens, **options)
    key, value = key[:, : starts + tokens], value[:, : starts + tokens]
    deterministic = torch.are_deterministic_algorithms_enabled()
    return flash_attn.flash_attn_func(query, key, value, dropout_p=dropout, deterministic=deterministic, **options)


def vision_unsupported(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, scale: float) -> str | None:
    """Why flash-attn cannot run this call, or None."""
    return _common(query, key, value, cu_seqlens) or _backward_objection(query, key, value, 0.0)


def vision_attention(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, scale: float) -> Tensor:
    """query, key, value [N, H, K]; every patch sees its own frame. The contract of `vision_attention`."""
    return _varlen(query, key, value, cu_seqlens, softmax_scale=scale, causal=False)


def _varlen(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, **options: Any) -> Tensor:
    """Over sequences that lie one behind the other. The longest is read on the host: it sizes the grid."""
    flash_attn: Any = importlib.import_module("flash_attn")
    longest = int(cu_seqlens.diff().max())
    bounds = cu_seqlens.to(device=query.device, dtype=torch.int32)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return flash_attn.flash_attn_varlen_func(
        query, key, value, bounds, bounds, longest, longest, deterministic=deterministic, **options
    )


def _common(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None) -> str | None:
    width = query.shape[-1]
    if width > _WIDEST:
        return f"query has heads of {width}, flash_attn takes up to {_WIDEST}"
    if width % 8:
        return f"query has heads of {width}, flash_attn takes multiples of 8"
    if value.shape[-1] != width:
        return f"value has heads of {value.shape[-1]} and query of {width}, flash_attn takes one width"
    if torch.compiler.is_compiling():
        return "a graph is being compiled; torch's own attention is part of it"
    if cu_seqlens is not None and cu_seqlens.shape[0] < 2:
        return "cu_seqlens names no sequence"
    if query.dtype != key.dtype or query.dtype != value.dtype:
        return f"query is {query.dtype}, key {key.dtype}, value {value.dtype}: flash_attn takes one dtype"
    tensors = {"query": query, "key": key, "value": value}
    return (
        runtime.unsupported_dtype(*_FLOATS, **tensors)
        or runtime.unsupported_cuda(**tensors)
        or runtime.unsupported_capability("flash_attn", query, (8, 0))
    )


def _backward_objection(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> str | None:
    """Its wide backward with dropout needs the shared memory of an A100, H100 or B200."""
    if dropout and query.shape[-1] > 192 and runtime.needs_gradient(query, key, value):
        capability = runtime.capability(query)
        if capability is not None and capability not in ((8, 0), (9, 0), (10, 0)):
            return f"dropout {dropout}: heads of {query.shape[-1]} have no backward with it on capability {capability}"
    return None


def _missing() -> str | None:
    how = "pip install 'flash-attn>=2.6' --no-build-isolation"
    if reason := runtime.package_missing("flash_attn", how):
        return reason
    try:
        version = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:  # the folder of flash-attn 4 alone, which has other functions
        return f"flash_attn is installed without flash-attn 2: {how}"
    numbers = tuple(int(part) for part in version.split(".")[:2])
    return None if numbers >= _OLDEST else f"flash-attn {version} is installed, 2.6 is needed: {how}"


def register(register: Callable[..., None]) -> None:
    """Enter the table in front of torch's scaled_dot_product_attention."""
    missing = _missing()
    options = {"before": "torch", "missing": missing}
    register("attention", "flash_attn", attention, attention_unsupported, skips=("scores",), **options)
    register("vision_attention", "flash_attn", vision_attention, vision_unsupported, **options)
