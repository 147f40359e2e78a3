"""Reads on the host, some steps late: it never waits for a device that has work.

A GPU runs behind the host: reading a token at once would leave it idle until the host has launched the next step. So each
step's report is copied into pinned memory, with an event behind the copy, and read when the event has come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

BEHIND = 4  # steps that the host may be behind: the most that are computed in vain after the last row has ended


class Read(NamedTuple):
    """One step: each row's token, whether it has ended, and the first step at which it had no usable logit, -1 for none."""

    step: int
    tokens: list[int]
    done: list[int]
    failed: list[int]


class HostCopy(Protocol):
    """A copy of a report [rows of integers] on the host, which may take its time."""

    def start(self, report: Tensor) -> None:
        """Begins a copy of the report's present value."""

    def ready(self) -> bool:
        """Whether `read` would return at once."""
        ...

    def read(self) -> list[list[int]]:
        """The value, as soon as it is there."""
        ...


class ImmediateCopy:
    """The copy of a device that the host need not wait for, such as the CPU."""

    def start(self, report: Tensor) -> None:
        self.values: list[list[int]] = report.tolist()

    def ready(self) -> bool:
        return True

    def read(self) -> list[list[int]]:
        return self.values


class PinnedCopy:
    """A copy from a GPU, in the order of its current stream."""

    def __init__(self) -> None:
        self.values = torch.empty(0)
        self.event = torch.cuda.Event()

    def start(self, report: Tensor) -> None:
        if self.values.shape != report.shape:
            self.values = torch.empty(report.shape, dtype=report.dtype, device="cpu", pin_memory=True)
        self.values.copy_(report, non_blocking=True)
        self.event.record(torch.cuda.current_stream(report.device))

    def ready(self) -> bool:
        return self.event.query()

    def read(self) -> list[list[int]]:
        self.event.synchronize()
        return self.values.tolist()


def late_copy(device: torch.device) -> Callable[[], HostCopy] | None:
    """The copy from a device that runs behind the host; None where every read is immediate."""
    return PinnedCopy if device.type == "cuda" else None


class LateReads:
    """The reports of the steps, in their order: at most `behind` of them are not read yet when `take` returns."""

    def __init__(self, copy: Callable[[], HostCopy], behind: int) -> None:
        self.copy, self.behind = copy, behind
        self._waiting: deque[tuple[int, HostCopy]] = deque()
        self._unused: list[HostCopy] = []

    def put(self, step: int, report: Tensor) -> None:
        """The report of a step whose operations have been launched."""
        copy = self._unused.pop() if self._unused else self.copy()
        copy.start(report)
        self._waiting.append((step, copy))

    def take(self, everything: bool = False) -> Iterator[Read]:
        """The steps that can be read without waiting, and those that must be: all but `behind`, or everything."""
        while self._waiting:
            step, copy = self._waiting[0]
            if len(self._waiting) <= self.behind and not everything and not copy.ready():
                return
            tokens, done, failed, *_ = copy.read()
            self._waiting.popleft()
            self._unused.append(copy)
            yield Read(step, tokens, done, failed)
