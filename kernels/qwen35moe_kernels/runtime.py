"""What every path of this package asks first: is Triton here, may these tensors go to it, where does a path stand.

Triton kernels run on CUDA tensors. With TRITON_INTERPRET=1, set before Triton is first imported, they run in Triton's
interpreter on CPU tensors as well: how the suite tests them without a GPU, and thousands of times slower than PyTorch,
so that they then stand behind every other form and run when they are asked for by name.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

TRITON = (3, 6)  # the oldest version whose language these kernels are written in
NO_DEVICE = "there is no CUDA device"


def installed(package: str) -> bool:
    """Whether `import package` would find one. Nothing is imported: a broken installation shows where it is used."""
    return importlib.util.find_spec(package) is not None


@cache
def triton_missing() -> str | None:
    """None, or why Triton cannot be used here: not installed, or too old."""
    if not installed("triton"):
        return "triton is not installed: pip install 'triton>=3.6'"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # some builds come under another distribution's name
        import triton

        version = triton.__version__
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    return None if numbers >= TRITON else f"triton {version} is installed, these kernels need 3.6 or newer"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def missing() -> str | None:
    """Why no own kernel can run on this machine whatever the inputs: the `missing` of a Triton path."""
    if reason := triton_missing():
        return reason
    return None if interpreted() or torch.cuda.is_available() else NO_DEVICE


def package_missing(package: str, how: str) -> str | None:
    """The same for a path through another package that needs a GPU. how: what installs it."""
    if not installed(package):
        return f"{package} is not installed: {how}"
    return None if torch.cuda.is_available() else NO_DEVICE


def place(before: str) -> str | None:
    """Where a Triton path registers itself: in front of the form named, or last under the interpreter."""
    return None if interpreted() else before


def unsupported_device(**tensors: Tensor | None) -> str | None:
    """None where every tensor can be handed to one Triton kernel, else which cannot: CUDA, or interpreted on a CPU."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    for name, device in devices.items():
        if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
            return f"{name} is on {device}, not on CUDA"
    return _one_device(devices)


def unsupported_cuda(**tensors: Tensor | None) -> str | None:
    """The same for packages that know no interpreter."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    for name, device in devices.items():
        if device.type != "cuda":
            return f"{name} is on {device}, not on CUDA"
    return _one_device(devices)


def _one_device(devices: dict[str, torch.device]) -> str | None:
    first, *others = devices
    for other in others:
        if devices[other] != devices[first]:
            return f"{first} is on {devices[first]} and {other} on {devices[other]}"
    return None


def unsupported_dtype(*allowed: torch.dtype, **tensors: Tensor | None) -> str | None:
    """None, or which tensor is in none of the allowed dtypes."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in allowed:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')}, not one of {names}"
    return None


def kernels(file: str) -> Any:
    """The Triton functions of a file of this package, imported where they are first launched."""
    return importlib.import_module(f"qwen35moe_kernels.{file}")


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Around a launch: Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd wants to know of an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`: what a block of a kernel measures."""
    return 1 << max(0, size - 1).bit_length()


def parts(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


def capability(tensor: Tensor) -> tuple[int, int] | None:
    """The compute capability of the tensor's GPU; None where it is on none."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else None


def unsupported_capability(package: str, tensor: Tensor, least: tuple[int, int]) -> str | None:
    """None, or that the tensor's GPU is too old for a package."""
    found = capability(tensor)
    if found is None or found >= least:
        return None
    return f"{package} needs compute capability {least[0]}.{least[1]}, {tensor.device} has {found[0]}.{found[1]}"
