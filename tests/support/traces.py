"""Which addresses the programs of a launch read and write, in Triton's interpreter.

Programs run in any order on a GPU, and at the same time: two that write one address, or of which one reads what the other
writes, race. Offsets that do not fit into 32 bits wrap around silently, in the interpreter as on a GPU, so that an address
lies outside of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.support.kernel_modules import KernelModule


@dataclass
class Launch:
    kernel: str
    programs: int = 0
    stored: int = 0
    outside: int = 0
    races: int = 0


@dataclass
class Trace:
    """The launches inside `traced`. last: only the last program of each runs, and of the tensors it reads and writes
    those of integers only."""

    last: bool
    launches: list[Launch] = field(default_factory=list)
    writes: list[tuple[int, np.ndarray]] = field(default_factory=list)
    reads: list[tuple[int, np.ndarray]] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)

    def note(self, into: list[tuple[int, np.ndarray]], program: int, pointers: Any, mask: Any) -> None:
        addresses = np.asarray(pointers.data).reshape(-1).astype(np.uint64)
        if mask is not None:
            addresses = addresses[np.broadcast_to(np.asarray(mask.data).reshape(-1).astype(bool), addresses.shape)]
        inside = np.zeros(addresses.shape, dtype=bool)
        for begin, end in self.spans:
            inside |= (addresses >= begin) & (addresses < end)
        self.launches[-1].outside += int((~inside).sum())
        into.append((program, addresses if self.last else np.unique(addresses)))

    def finish(self) -> None:
        """Counts the races of the launch that ends: addresses written by two programs, or read by another one."""
        launch = self.launches[-1]
        owner: dict[int, int] = {}
        if self.last:
            launch.programs, launch.stored = 1, sum(len(addresses) for _, addresses in self.writes)
            self.writes.clear()
            self.reads.clear()
            return
        for program, addresses in self.writes:
            for address in addresses.tolist():
                launch.races += owner.setdefault(address, program) != program
        for program, addresses in self.reads:
            launch.races += sum(owner.get(address, program) != program for address in addresses.tolist())
        launch.programs, launch.stored = len({program for program, _ in self.writes}), len(owner)
        self.writes.clear()
        self.reads.clear()


class Kernel:
    """In place of a Triton kernel."""

    def __init__(self, trace: Trace, function: Any, name: str) -> None:
        self.trace, self.function, self.name = trace, function, name

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            storages = [x.untyped_storage() for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            self.trace.spans = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]
            self.trace.launches.append(Launch(self.name))
            self.function[grid](*args, **kwargs)
            self.trace.finish()

        return launch


def _last(*bounds: int) -> Any:
    """In place of `range`: that over a grid, which has one bound, ends at once."""
    return (bounds[0] - 1,) if len(bounds) == 1 else range(*bounds)


@contextmanager
def traced(*, last: bool = False) -> Iterator[Trace]:
    from triton.runtime import interpreter

    from qwen35moe_kernels import runtime

    builder, trace = interpreter.interpreter_builder, Trace(last)
    load, store, kernels = builder.create_masked_load, builder.create_masked_store, runtime.kernels

    def program() -> int:
        return hash(tuple(builder.grid_idx))

    def traced_load(pointers: Any, mask: Any, *others: Any) -> Any:
        trace.note(trace.reads, program(), pointers, mask)
        kind = pointers.get_element_ty()
        if not last or kind.is_int():
            return load(pointers, mask, *others)
        return interpreter.TensorHandle(np.zeros(pointers.data.shape, dtype=interpreter._get_np_dtype(kind)), kind)

    def traced_store(pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        trace.note(trace.writes, program(), pointers, mask)
        if not last or pointers.get_element_ty().is_int():
            store(pointers, value, mask, *others)

    def replaced(file: str) -> KernelModule:
        return KernelModule(file, kernels(file), lambda kernel, name: Kernel(trace, kernel, name))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(builder, "create_masked_load", traced_load))
        stack.enter_context(mock.patch.object(builder, "create_masked_store", traced_store))
        stack.enter_context(mock.patch.object(runtime, "kernels", replaced))
        if last:
            stack.enter_context(mock.patch.object(interpreter, "range", _last, create=True))
            stack.enter_context(mock.patch.object(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None))
        yield trace
