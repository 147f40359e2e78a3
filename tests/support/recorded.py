"""A stand-in for `torch.cuda.CUDAGraph` on a CPU: the operations that a function runs, run again on the same memory.

As with a graph, every number of Python that entered an operation is that of the capture, new tensors lie where the
capture's did, capturing computes nothing, and reading a value on the host is an error. So replays give the function's own
results only if nothing but the contents of memory changes between two calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_dim")


class Recording(TorchDispatchMode):
    """Records operations with their arguments and results; `undo` takes back what they wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.fresh: set[int] = set()  # storages made while capturing
        self.before: dict[int, tuple[Any, Any]] = {}  # storages that were written: themselves, and copies

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.split("::")[1]
        masks = name.startswith("index") and any(x.dtype == torch.bool for x in tensors(args[1:2]))
        if name in READS or masks:
            raise RuntimeError(f"{name} reads a value on the host: operation not permitted when stream is capturing")
        for x in self._written(func, args, kwargs):
            storage = x.untyped_storage()
            if storage._cdata not in self.fresh:
                self.before.setdefault(storage._cdata, (storage, storage.clone()))
        result = func(*args, **kwargs)
        new = new_tensors(result, args, kwargs)
        self.fresh.update(x.untyped_storage()._cdata for x in new)
        self.calls.append((func, args, kwargs, new))
        return result

    @staticmethod
    def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from tensors(args[index] if index < len(args) else kwargs.get(argument.name))

    def undo(self) -> None:
        for storage, copy in self.before.values():
            storage.copy_(copy)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, new in self.calls:
            result = func(*args, **kwargs)
            for old, value in zip(new, new_tensors(result, args, kwargs), strict=True):
                old.copy_(value)


def tensors(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def new_tensors(result: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors of a result that share no memory with the arguments."""
    own = {x.untyped_storage()._cdata for x in tensors((args, kwargs))}
    return [x for x in tensors(result) if x.untyped_storage()._cdata not in own]


class GraphCapture:
    """In place of `qwen35moe.generation.captured.GraphCapture`; counts captures and replays."""

    def __init__(self) -> None:
        self.warmed = self.captures = self.replays = 0

    def warm(self, function: Callable[[], None]) -> None:
        self.warmed += 1
        function()

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        recording = Recording()
        try:
            with recording:
                function()
        finally:
            recording.undo()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            recording.replay()

        return replay
