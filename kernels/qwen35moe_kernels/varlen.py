"""Adapter to PyTorch's attention of packed sequences (`torch.nn.attention.varlen.varlen_attn`, torch >= 2.10).

It runs FlashAttention (since torch 2.14 also cuDNN) over all frames of images of different sizes in one launch, where
`scaled_dot_product_attention` needs one per size. Arguments that all versions take in the same way are passed: the scale has no
name in 2.10, and its default K^-0.5 is the tower's. The contract, line by line: docs/reference/adapters.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from qwen35moe_kernels import runtime

_MODULE = "torch.nn.attention.varlen"
_FLOATS = (torch.float16, torch.bfloat16)
_WIDEST = 256


def unsupported(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, scale: float) -> str | None:
    """None, or the reason why varlen_attn cannot run this call."""
    width = query.shape[-1]
    if abs(scale * width**0.5 - 1) > 1e-6:
        return f"scale {scale:.6g} is not K^-0.5 = {width**-0.5:.6g}, the only one of varlen_attn in all versions of torch"
    if width > _WIDEST or width % 8:
        return f"query has heads of {width}, varlen_attn takes multiples of 8 up to {_WIDEST}"
    if not query.numel():
        return f"query {list(query.shape)} is empty"
    if torch.compiler.is_compiling():
        return "a graph is being compiled, in which the longest frame is not known"
    if not query.dtype == key.dtype == value.dtype:
        return f"query is {query.dtype}, key {key.dtype}, value {value.dtype}: varlen_attn takes one dtype"
    tensors = {"query": query, "key": key, "value": value}
    return (
        runtime.unsupported_dtype(*_FLOATS, **tensors)
        or runtime.unsupported_cuda(**tensors)
        or runtime.unsupported_capability("varlen_attn", query, (8, 0))
    )


def slower(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, scale: float) -> str | None:
    """None, or the reason why "auto" takes scaled_dot_product_attention."""
    values = runtime.values_on_host(cu_seqlens)
    if values is None:
        return None
    sizes = sum(1 for _ in groupby(end - start for start, end in pairwise(values)))
    return "the frames have one size, and one call of scaled_dot_product_attention takes them all" if sizes == 1 else None


def vision_attention(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, scale: float) -> Tensor:
    """query, key, value [N, H, K]; a patch attends to its own frame, as `vision_attention` defines it."""
    varlen: Any = importlib.import_module(_MODULE)
    query, key, value = runtime.aligned(query), runtime.aligned(key), runtime.aligned(value)
    bounds, longest = runtime.varlen_bounds(cu_seqlens, query.device)
    return runtime.align_gradient(varlen.varlen_attn(query, key, value, bounds, bounds, longest, longest))


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return runtime.NO_DEVICE
    return None if runtime.installed(_MODULE) else f"torch {torch.__version__} has no {_MODULE}: install torch 2.10 or newer"


def register(register: Callable[..., None]) -> None:
    """Registers ahead of the form with one call per size."""
    register(
        "vision_attention", "varlen", vision_attention, unsupported, before="torch", missing=_missing(), slower=slower,
        **runtime.FIRST_ORDER,
    )  # fmt: skip
