"""In which dtype an operation computes: never less than float32, and float64 stays float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of an operation's arithmetic: max(float32, dtype of its inputs). float64 in, float64 throughout."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


Function = TypeVar("Function", bound=Callable[..., Any])


def without_autocast(function: Function) -> Function:
    """The same with autocast off inside. Autocast is for the projections: it would round the products of an operation that
    has widened its inputs to bfloat16 again, and even a sum of squares (`vecdot`), though not those written in place."""

    @functools.wraps(function)
    def exact(*args: Any, **options: Any) -> Any:
        for x in args:  # the first tensor tells the device; a generator would cost another call
            if isinstance(x, Tensor):
                break
        kind = x.device.type  # pyright: ignore[reportPossiblyUnboundVariable]
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return function(*args, **options)
        with torch.autocast(kind, enabled=False):
            return function(*args, **options)

    return exact  # pyright: ignore[reportReturnType]


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All tensors in their common `wide_dtype`."""
    dtype = wide_dtype(*tensors)
    return tuple(tensor.to(dtype) for tensor in tensors)
