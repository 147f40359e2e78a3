"""Checks that all modules of this package share: Triton, other packages, devices, dtypes, and the place in the table.

Triton kernels run on CUDA tensors. With TRITON_INTERPRET=1, set before Triton is first imported, they also run on CPU
tensors, in Triton's interpreter. The tests use it on machines without a GPU. It is thousands of times slower than PyTorch, so
the kernels are then last in the table and run only when chosen by name.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
import os
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

TRITON = (3, 6)  # the oldest version whose language these kernels use
# Options of `register` for a kernel with a backward of its own: no transform of torch.func, no derivative of the backward.
FIRST_ORDER: dict[str, Any] = {"transforms": (), "double_backward": False}
NO_DEVICE = "there is no CUDA device"


def installed(package: str) -> bool:
    """Whether the package is installed. It is not imported: a broken installation raises where it is used."""
    return importlib.util.find_spec(package) is not None


def version_numbers(version: str) -> tuple[int, ...]:
    """(3, 7, 1) for "3.7.1+cu130" and for "3.7.1.post2": the leading parts that start with a digit."""
    digits = ("".join(itertools.takewhile(str.isdigit, part)) for part in version.split("+")[0].split("."))
    return tuple(int(number) for number in itertools.takewhile(bool, digits))


@cache
def triton_missing() -> str | None:
    """None, or the reason why Triton cannot be used: not installed, or too old."""
    if not installed("triton"):
        return "triton is not installed: pip install 'triton>=3.6'"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # some builds have another distribution name
        import triton

        version = triton.__version__
    if version_numbers(version) >= TRITON:
        return None
    return f"triton {version} is installed, these kernels need 3.6 or newer"


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def missing() -> str | None:
    """`missing` of a Triton kernel: None, or the reason why no Triton kernel can run on this machine."""
    if reason := triton_missing():
        return reason
    return None if interpreted() or torch.cuda.is_available() else NO_DEVICE


def package_missing(
    package: str, how: str, *, distribution: str | None = None, oldest: tuple[int, ...] = ()
) -> str | None:  # fmt: skip
    """`missing` of an adapter to a package that needs a GPU. how: the command that installs it; distribution: the name under
    which `oldest` is compared with the installed version."""
    if not installed(package):
        return f"{package} is not installed: {how}"
    if not torch.cuda.is_available():
        return NO_DEVICE
    if distribution is None:
        return None
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is installed without the distribution {distribution}: {how}"
    if version_numbers(version) >= oldest:
        return None
    return f"{distribution} {version} is installed, {'.'.join(map(str, oldest))} or newer is needed: {how}"


def place(before: str) -> str | None:
    """The `before` of a Triton kernel: the implementation named, or None (last) in the interpreter."""
    return None if interpreted() else before


def unsupported_device(**tensors: Tensor | None) -> str | None:
    """None, or which tensor a Triton kernel cannot take: all must be on one CUDA device, or on a CPU in the interpreter."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    for name, device in devices.items():
        if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
            return f"{name} is on {device}, not on CUDA"
    return _one_device(devices)


def unsupported_cuda(**tensors: Tensor | None) -> str | None:
    """None, or which tensor is not on the one CUDA device of the others."""
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
    """None, or which tensor has none of the allowed dtypes."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in allowed:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            return f"{name} is {str(tensor.dtype).removeprefix('torch.')}, not one of {names}"
    return None


def kernels(file: str) -> Any:
    """A module of Triton kernels of this package, imported at the first launch."""
    return importlib.import_module(f"qwen35moe_kernels.{file}")


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Context of a launch: Triton launches on the current device, which can differ from the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy of it, for packages that access rows 16 bytes at a time: the last dimension is
    contiguous; the offset into the storage and the strides, of dimensions of size 1 as well, are multiples of 8 elements."""
    *strides, last = tensor.stride()
    if last == 1 and not tensor.storage_offset() % 8 and not any(stride % 8 for stride in strides):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def align_gradient(output: Tensor) -> Tensor:
    """`output`, whose gradient reaches its backward contiguous and aligned, in whatever layout autograd computed it."""
    if output.requires_grad:
        output.register_hook(lambda gradient: aligned(gradient.contiguous()))
    return output


def strictly_deterministic() -> bool:
    """Whether torch.use_deterministic_algorithms is set to raise."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`: the length of a kernel's block."""
    return 1 << max(0, size - 1).bit_length()


def parts(size: int, block: int) -> int:
    """Number of blocks that cover `size`."""
    return -(-size // block)


def capability(tensor: Tensor) -> tuple[int, int] | None:
    """Compute capability of the tensor's GPU; None for a tensor that is not on a GPU."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else None


def hopper(tensor: Tensor) -> bool:
    """Whether the tensor's GPU is a Hopper (compute capability 9.0), whose matrix instructions read shared memory. Others keep
    the operands in registers. An AMD GPU of capability 9.4 is none."""
    return capability(tensor) == (9, 0) and torch.version.hip is None


def shared_memory(tensor: Tensor) -> int:
    """Bytes of shared memory that one program may use on the tensor's GPU; no limit in the interpreter."""
    return _shared_memory(tensor.device.index or 0) if tensor.is_cuda else 1 << 30


@cache
def _shared_memory(index: int) -> int:
    properties = torch.cuda.get_device_properties(index)
    for name in ("shared_memory_per_block_optin", "shared_memory_per_block"):  # ROCm builds of torch have the second only
        if value := getattr(properties, name, 0):
            return int(value)
    from triton.runtime import driver

    active: Any = driver.active
    return int(active.utils.get_device_properties(index)["max_shared_mem"])


def unsupported_capability(package: str, tensor: Tensor, least: tuple[int, int]) -> str | None:
    """None, or the reason why the tensor's GPU is too old for a package."""
    current = capability(tensor)
    if current is None or current >= least:
        return None
    return f"{package} needs compute capability {least[0]}.{least[1]}, {tensor.device} has {current[0]}.{current[1]}"


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. From the CPU to a GPU through pinned memory, so that the host does not wait for the GPU."""
    if tensor.is_cpu and device.type == "cuda" and not is_fake(tensor):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def same_result(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps the last result of a function of a tensor: the same object until another tensor comes or its values change."""
    last: tuple[Any, ...] = (lambda: None, None, None)

    def cached(tensor: Tensor, *others: Any) -> Any:
        nonlocal last
        if tensor.is_inference():  # counts no versions
            return function(tensor, *others)
        of, key, result = last
        now = (tensor._version, torch.is_inference_mode_enabled(), *others)  # autograd saves no tensor of inference mode
        if of() is not tensor or key != now:
            result = function(tensor, *others)
            last = (weakref.ref(tensor), now, result)
        return result

    return cached


def values_on_host(cu_seqlens: Tensor) -> list[int] | None:
    """The bounds where the host has them: on the CPU, or beside a tensor on a GPU (`qwen35moe.backends.values`). Else None."""
    version, values = getattr(cu_seqlens, "_host_values", (None, []))
    if version is not None and version == (0 if cu_seqlens.is_inference() else cu_seqlens._version):
        return values
    return cu_seqlens.tolist() if cu_seqlens.is_cpu else None


@same_result
def varlen_bounds(cu_seqlens: Tensor, device: torch.device) -> tuple[Tensor, int]:
    """The bounds of packed sequences, contiguous int32 on `device`, and the length of the longest, which sets a grid's size.
    Made once for all layers of a call. The host reads bounds on a GPU unless they keep their values beside them, and does not
    wait for those on the CPU.

    For a length of 1 and grouped heads flash-attn reshapes the query to one row per sequence, which fails if one is empty: 2
    is as good a bound.
    """
    values = values_on_host(cu_seqlens)
    values = cu_seqlens.tolist() if values is None else values
    longest = max(2, *(end - start for start, end in itertools.pairwise(values)))
    return send(cu_seqlens.to(torch.int32).contiguous(), device), longest
