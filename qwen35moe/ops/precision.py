"""The dtype in which an operation computes: float32 at least, and float64 for float64 inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of an operation's arithmetic: max(float32, dtypes of its inputs)."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.is_floating_point():
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def float64_device(device: torch.device) -> torch.device:
    """`device`, or the CPU for one without float64 (Apple's MPS)."""
    return torch.device("cpu") if device.type == "mps" else device


Function = TypeVar("Function", bound=Callable[..., Any])


def without_autocast(function: Function) -> Function:
    """Decorator: disable autocast inside `function`. Autocast is meant for the projections. Here it would round the inputs of
    products, which are float32 on purpose, to bfloat16: matrix products and even `vecdot`, though not their in-place forms."""

    @functools.wraps(function)
    def exact(*args: Any, **options: Any) -> Any:
        for x in args:  # the first tensor has the device; a generator would cost another call
            if isinstance(x, Tensor):
                break
        else:
            return function(*args, **options)
        kind = x.device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return function(*args, **options)
        with torch.autocast(kind, enabled=False):
            return function(*args, **options)

    return exact  # pyright: ignore[reportReturnType]


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All tensors in their common `wide_dtype`."""
    dtype = wide_dtype(*tensors)
    return tuple(tensor.to(dtype) for tensor in tensors)
