"""Which tensors hold values that a check may read.

Tensors of a compiled graph, fake tensors and tensors on the meta device hold none. A tensor of torch.vmap holds a value for
each of its calls: none decides for all of them, but a check can read them together (`unbatched`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

_functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


def values_known(tensor: Tensor) -> bool:
    """Whether the tensor holds values that decide for the whole call: not compiled, fake or meta, and not of torch.vmap."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return False
    return unbatched(tensor) is tensor and not is_fake(tensor)


def send(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`. For a GPU through pinned memory, so that the host does not wait for it."""
    if device.type == "cuda" and values.is_cpu and values_known(values):
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device, non_blocking=True)


def unbatched(tensor: Tensor) -> Tensor:
    """The tensor itself; of a tensor of torch.vmap, the values of all calls."""
    if torch.compiler.is_compiling():
        return tensor
    batched, inner = False, tensor
    while _functorch.is_functorch_wrapped_tensor(inner):  # torch.func.grad and jvp wrap tensors too
        batched = batched or _functorch.is_batchedtensor(inner)
        inner = _functorch.get_unwrapped(inner)
    return inner if batched else tensor
