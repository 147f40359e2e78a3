"""In which dtype an operation computes: never less than float32, and float64 stays float64."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of an operation's arithmetic: max(float32, dtype of its inputs). float64 in, float64 throughout."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All tensors in their common `wide_dtype`."""
    dtype = wide_dtype(*tensors)
    return tuple(tensor.to(dtype) for tensor in tensors)
