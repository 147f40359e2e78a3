"""A module of Triton kernels in which every kernel is replaced, for harnesses that count, compile or trace launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

KERNELS = ("JITFunction", "InterpretedFunction")  # of the compiler, and of the interpreter


class KernelModule:
    """Attributes of `module`; a kernel is replace(kernel, "file.kernel")."""

    def __init__(self, file: str, module: Any, replace: Callable[[Any, str], Any]) -> None:
        self.file, self.module, self.replace = file, module, replace

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        return self.replace(value, f"{self.file}.{name}") if type(value).__name__ in KERNELS else value
