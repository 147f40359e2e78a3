"""Compiling Triton kernels for a GPU without one: `python -m tests.compile_triton` for all of this package's.

The interpreter accepts what the compiler refuses. Triton's wheel brings ptxas, so a kernel can be compiled down to
machine code for a target that is not there; `cuobjdump`, beside it, says what it needs: registers a thread, bytes
spilled to local memory, shared memory. Run in a process without TRITON_INTERPRET.
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

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Kernel:
    """One compilation. types: what each argument that is no constexpr is ("*bf16", "i32", "fp32"), by name;
    aligned: whether pointers and sizes may be taken for multiples of 16, as they are at the published sizes."""

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
    """What one program takes: registers a thread, bytes a thread spills or stacks, bytes of shared memory."""

    name: str
    registers: int
    local: int
    shared: int


def compiled(kernels: list[Kernel], timeout: float = 1800.0) -> list[Usage]:
    """Each kernel compiled in one process of its own, cached nowhere; RuntimeError with the compiler's words."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": folder, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
        done = subprocess.run(
            [sys.executable, "-m", "tests.compile_triton"], input=json.dumps([asdict(kernel) for kernel in kernels]),
            capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return [Usage(**usage) for usage in json.loads(done.stdout.splitlines()[-1])]


def _compile(kernel: Kernel) -> Usage:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(kernel.module), kernel.name)
    unknown = set(function.arg_names) ^ {*kernel.types, *kernel.constants}
    if unknown:
        raise ValueError(f"{kernel.name}: {sorted(unknown)} given and not taken, or taken and not given")
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
    print(json.dumps([asdict(_compile(Kernel(**one))) for one in json.load(sys.stdin)]))
