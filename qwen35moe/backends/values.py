"""Which tensors hold values that a check may read.

Tensors of a compiled graph, fake tensors and tensors on the meta device hold none. A tensor of torch.vmap holds a value for
each of its calls: none decides for all of them, but a check can read them together (`unbatched`).

The host waits for a GPU whenever it reads a value there. A call reads what it needs at once (`on_host`), and a small tensor
that was computed on the host keeps its values beside it (`with_host_values`).
"""

from __future__ import annotations

from collections.abc import Sequence
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


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in CPU memory, bit for bit; those of one other device in one transfer, for which the host waits."""
    out = list(tensors)
    for device in {tensor.device for tensor in tensors if not tensor.is_cpu}:
        places = [i for i, tensor in enumerate(tensors) if tensor.device == device and not tensor.is_cpu]
        pieces = [tensors[i].detach().contiguous() for i in places]
        flat = torch.cat([piece.reshape(-1).view(torch.uint8) for piece in pieces]).cpu()
        parts = flat.split([piece.numel() * piece.element_size() for piece in pieces])
        for i, piece, part in zip(places, pieces, parts, strict=True):
            out[i] = part.clone().view(piece.dtype).view(piece.shape)  # clone: aligned for the dtype
    return out


def with_host_values(tensor: Tensor, values: Sequence[int]) -> Tensor:
    """A vector of integers that keeps its values beside it, for `host_values`."""
    if not torch.compiler.is_compiling():
        tensor._host_values = (_version(tensor), list(values))  # type: ignore[attr-defined]
    return tensor


def host_values(tensor: Tensor) -> list[int]:
    """The values of a vector of integers. The host waits for the device unless the tensor keeps them beside it."""
    version, values = getattr(tensor, "_host_values", (None, []))
    return values if version is not None and version == _version(tensor) else tensor.tolist()


def _version(tensor: Tensor) -> int:
    """Counts the changes in place; inference tensors do not."""
    return 0 if tensor.is_inference() else tensor._version
