"""Compiles Triton kernels for a GPU on a machine without one, in a process of its own.

The interpreter accepts code that the compiler rejects. Triton's wheel contains ptxas, so that a kernel can be compiled to
machine code for an absent target, and `cuobjdump`, which reports its registers per thread, bytes spilled to local memory, and
shared memory. The process must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Kernel:
    """One compilation. types: the type of each argument that is not a constexpr ("*bf16", "i32", "fp32"), by name; aligned:
    pointers and sizes that are multiples of 16, as at the published sizes."""

    module: str
    name: str
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    capability: int = 90
    aligned: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Usage:
    """Registers per thread, bytes per thread in local memory (spills and stack), and bytes of shared memory."""

    name: str
    registers: int
    local: int
    shared: int


def compiled(kernels: list[Kernel], timeout: float = 1800.0) -> list[Usage]:
    """Compiles the kernels in one new process, without a cache; RuntimeError with the compiler's message."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": folder, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
        process = subprocess.run(
            [sys.executable, "-m", "tests.support.compile_triton"], input=json.dumps([asdict(kernel) for kernel in kernels]),
            capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout,
        )  # fmt: skip
    if process.returncode:
        raise RuntimeError(process.stderr[-4000:])
    return [Usage(**usage) for usage in json.loads(process.stdout.splitlines()[-1])]


def _compile(kernel: Kernel) -> Usage:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(kernel.module), kernel.name)
    unmatched = set(function.arg_names) ^ {*kernel.types, *kernel.constants}
    if unmatched:
        raise ValueError(f"{kernel.name}: {sorted(unmatched)} are not both arguments of the kernel and in types or constants")
    signature = {name: kernel.types.get(name, "constexpr") for name in function.arg_names}
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in kernel.aligned}
    source = ASTSource(fn=function, signature=signature, constexprs=kernel.constants, attrs=attributes)
    target = GPUTarget("cuda", kernel.capability, 32)
    binary = triton.compile(source, target=target, options={"num_warps": kernel.warps, "num_stages": kernel.stages})
    return Usage(kernel.name, *_usage(binary.asm["cubin"]), binary.metadata.shared)


def _usage(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    return registers, stack + local


if __name__ == "__main__":
    print(json.dumps([asdict(_compile(Kernel(**kernel))) for kernel in json.load(sys.stdin)]))
