"""Runs the real launch code on fake CUDA tensors, on a machine without a GPU, and compiles what it would launch.

`reports([Request("sm_90", "delta_rule"), ...])` runs a process without TRITON_INTERPRET and returns every kernel that the case
would compile, once per compilation, with its registers, spills and shared memory. With `build=False` nothing is compiled: the
compilations are counted. Every launch is checked: the limits of its grid, the devices of its tensors, and that it runs in the
context of their device. Triton compiles for AMD without a GPU as well.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.support.compile_triton import ROOT, _usage
from tests.support.kernel_modules import KernelModule

# Compute capability, and the bytes of shared memory that one program may use.
TARGETS = {
    "sm_80": ((8, 0), 163 << 10), "sm_89": ((8, 9), 99 << 10), "sm_90": ((9, 0), 227 << 10), "sm_120": ((12, 0), 99 << 10),
    "gfx942": ((9, 4), 64 << 10),
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """A case of launch_cases.py on a target. only: the kernels that are compiled, all if empty."""

    target: str
    case: str
    arguments: tuple[Any, ...] = ()
    build: bool = True
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Built:
    """A compilation. waits: every product with an operand in registers is waited for at once (Hopper; else true)."""

    kernel: str
    grid: tuple[int, ...]
    warps: int
    stages: int
    registers: int = 0
    local: int = 0
    shared: int = 0
    waits: bool = True


def reports(requests: list[Request], *, each_once: bool = False, timeout: float = 1800.0) -> list[list[Built]]:
    """The compilations of each request, in one new process. The requests are for AMD's GPUs or for NVIDIA's, not for both.
    each_once: without those of an earlier request."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": folder, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
        process = subprocess.run(
            [sys.executable, "-m", "tests.support.launches", str(int(each_once))], capture_output=True,
            input=json.dumps([asdict(request) for request in requests]), text=True, cwd=ROOT, env=environment, timeout=timeout,
        )  # fmt: skip
    if process.returncode:
        raise RuntimeError(process.stderr[-4000:])
    return [[Built(**built) for built in result] for result in json.loads(process.stdout.splitlines()[-1])]


class Argument:
    """In place of a fake tensor: what Triton reads of one to choose a compilation."""

    def __init__(self, tensor: Any) -> None:
        self.dtype, self.shape, self.stride = tensor.dtype, tensor.shape, tensor.stride
        self.offset = tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self.offset % 256  # an allocation is aligned to 256 bytes

    def ptr_range(self) -> int:
        return 0


class Machine:
    """In place of Triton's driver, for a GPU that is absent."""

    def __init__(self) -> None:
        self.name = ""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        if self.name.startswith("gfx"):
            return GPUTarget("hip", self.name, 64)
        return GPUTarget("cuda", int(self.name.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.name)  # compilations are kept by device

    def get_current_stream(self, device: int = 0) -> int:
        return 0


class Recorder:
    """The launches of a case."""

    def __init__(self) -> None:
        self.built: list[Built] = []
        self.seen: set[tuple[str, str]] = set()
        self.request = Request("", "")
        self.inside: Any = None

    @contextmanager
    def on_device_of(self, tensor: Any) -> Iterator[None]:
        before, self.inside = self.inside, tensor.device
        yield
        self.inside = before

    def launch(self, function: Any, name: str, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        import torch

        sizes = tuple(grid) if isinstance(grid, (tuple, list)) else (grid,)
        if not all(isinstance(n, int) and n > 0 for n in sizes) or sizes[0] >= 1 << 31 or any(n > 65535 for n in sizes[1:]):
            raise AssertionError(f"{name}: grid {sizes}")
        devices = {x.device for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)}
        if devices != {self.inside}:
            raise AssertionError(f"{name}: tensors on {devices}, launched on {self.inside}")

        def compile_or_count(key: str, signature: Any, device: Any, constants: Any, options: Any, attrs: Any, _: Any) -> Any:
            if (name, key) not in self.seen:
                self.seen.add((name, key))
                build = self.request.build and (not self.request.only or name in self.request.only)
                usage = _build(function, signature, constants, options, attrs) if build else {}
                self.built.append(Built(name, sizes, options.num_warps, options.num_stages, **usage))
            return None

        with mock.patch.object(function, "_do_compile", compile_or_count):
            function.warmup(*map(_argument, args), grid=sizes, **{key: _argument(x) for key, x in kwargs.items()})


def _argument(x: Any) -> Any:
    import torch

    return Argument(x) if isinstance(x, torch.Tensor) else x


def _build(function: Any, signature: Any, constants: Any, options: Any, attrs: Any) -> dict[str, Any]:
    import triton
    from triton.compiler import ASTSource

    target = triton.runtime.driver.active.get_current_target()
    binary = triton.compile(ASTSource(function, signature, constants, attrs), target=target, options=options.__dict__)
    if "cubin" in binary.asm:
        registers, local = _usage(binary.asm["cubin"])
        return {"registers": registers, "local": local, "shared": binary.metadata.shared, "waits": _waits(binary.asm["ptx"])}
    text = binary.asm["amdgcn"]
    names = "vgpr_count", "private_segment_fixed_size"
    registers, local = (int(re.search(rf"\.{name}:\s*(\d+)", text)[1]) for name in names)  # type: ignore[index]
    return {"registers": registers, "local": local, "shared": binary.metadata.shared}


def _waits(ptx: str) -> bool:
    """Whether each group of Hopper's products that has an operand in registers is waited for right after its commit, with no
    group left in flight: between are moves of registers at most."""
    pending, committed = False, False
    for statement in re.sub(r"//[^\n]*", "", ptx).split(";"):
        if "wgmma.mma_async" in statement:
            pending |= re.search(r"\}\s*,\s*\{", statement) is not None
        elif "wgmma.commit_group" in statement:
            committed = pending
        elif re.search(r"wgmma\.wait_group\.sync\.aligned\s+0$", statement):
            pending = committed = False
        elif committed and not re.search(r"(mov|cvt)\.[\w.]+\s", statement):
            return False
    return not pending


class Kernel:
    """In place of a Triton kernel."""

    def __init__(self, recorder: Recorder, function: Any, name: str) -> None:
        self.recorder, self.function, self.name = recorder, function, name

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self.recorder.launch(self.function, self.name, grid, args, kwargs)


def _without_linked_cuda(torch: Any) -> Any:
    """A CPU build of torch has no CUDA device to switch to, which a few of its functions would do. Fake tensors need none."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Replace(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            name = func._schema.name.split("::")[1]
            if name in ("searchsorted", "bucketize"):
                like = args[1 if name == "searchsorted" else 0]
                return like.new_empty(like.shape, dtype=torch.int32 if kwargs.get("out_int32") else torch.int64)
            return func(*args, **kwargs)

    def contiguous(x: Any) -> Any:
        return x if x.is_contiguous() else torch.clone(x, memory_format=torch.contiguous_format)

    def item(x: Any, index: Any) -> Any:
        if isinstance(index, slice):
            return torch.ops.aten.slice(x, 0, index.start, index.stop)
        return x.new_empty(*index.shape, *x.shape[1:]) if isinstance(index, torch.Tensor) else original(x, index)

    original, torch.Tensor.contiguous = torch.Tensor.__getitem__, contiguous
    torch.Tensor.__getitem__ = item
    return Replace()


def _run(requests: list[Request], each_once: bool) -> list[list[Built]]:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.runtime import driver

    machine, recorder = Machine(), Recorder()
    driver.set_active(machine)
    if any(request.target.startswith("gfx") for request in requests):
        torch.version.hip = "6.4"  # type: ignore[attr-defined] # before the kernels are imported
    from qwen35moe_kernels import runtime
    from tests.support.launch_cases import CASES

    real = runtime.kernels
    runtime.kernels = lambda file: KernelModule(file, real(file), lambda kernel, name: Kernel(recorder, kernel, name))
    runtime.on_device_of = recorder.on_device_of
    torch.cuda.current_device = lambda: 0
    results, replace = [], _without_linked_cuda(torch)
    for request in requests:
        capability, shared = TARGETS[request.target]
        machine.name, recorder.request, recorder.built = request.target, request, []
        if not each_once:
            recorder.seen.clear()
        runtime._shared_memory.cache_clear()
        properties = SimpleNamespace(shared_memory_per_block_optin=shared)
        with (
            mock.patch.object(torch.cuda, "get_device_capability", lambda *_, it=capability: it),
            mock.patch.object(torch.cuda, "get_device_properties", lambda *_, it=properties: it),
            FakeTensorMode(), replace,
        ):  # fmt: skip
            CASES[request.case](*request.arguments)
        results.append(recorder.built)
    return results


if __name__ == "__main__":
    wanted = [Request(**request) for request in json.load(sys.stdin)]
    print(json.dumps([[asdict(built) for built in result] for result in _run(wanted, sys.argv[1] == "1")]))
