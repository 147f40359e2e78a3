"""Measures the memory that an operation takes, and limits it, without the memory that the process already had.

Resident memory includes library pages, which are counted when they are first touched: tens of MiB that depend on the build
of Python and torch. The peak of a process also hides everything smaller that comes later. The operation therefore runs in
a forked child: first on a small input (the rehearsal, which pages its code in), then, after the peak is reset, on the large
one. RLIMIT_AS counts the address space of mapped libraries (gigabytes in a CUDA build of torch), so a limit is the space
mapped now plus an allowance.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# The kernel's counters lag by some pages per processor, and Python may free a little meanwhile: a lower bound needs room.
LAG = 2**20
UNMEASURED = sys.platform != "linux"


def memory_of(kind: str) -> int:
    """A figure of /proc/self/status in bytes."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(kind + ":"))


def release_freed_memory() -> None:
    """Return memory that earlier tests freed to the system (glibc). An operation that reuses it would appear to take none."""
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def peak_growth(operation: Callable[[], object]) -> int:
    """The largest growth in bytes of this process' resident memory while the operation runs. Call it in a child that has run
    a rehearsal: see `memory_taken`."""
    if UNMEASURED:
        operation()
        return 0
    release_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    before = memory_of("VmRSS")
    operation()
    return memory_of("VmHWM") - before


def anonymous_growth(operation: Callable[[], object]) -> int:
    """As `peak_growth`, for anonymous memory: pages of files do not count. Sampled every 2 ms and at the end, so a shorter
    peak may be missed."""
    if UNMEASURED:
        operation()
        return 0
    release_freed_memory()
    before, samples, done = memory_of("RssAnon"), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            samples.append(memory_of("RssAnon"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    result = operation()  # kept alive until the last sample
    done.set()
    sampler.join()
    samples.append(memory_of("RssAnon"))
    del result
    return max(samples) - before


def memory_taken(
    operation: Callable[[], object], rehearsal: Callable[[], object],
    growth: Callable[[Callable[[], object]], int] = peak_growth,
) -> int:
    """Bytes that `operation` takes at its peak, in a child process that ran `rehearsal` first. What a test asserts of the
    outcome can stand in `operation`: its failure is raised here as an AssertionError."""

    def measured() -> int:
        rehearsal()
        return growth(operation)

    return forked(measured)


def forked(function: Callable[[], Any], seconds: int = 600) -> Any:
    """The result of `function`, a JSON value, computed in a forked child, which has everything imported already.

    AssertionError if the child raises, crashes or takes longer. Limits that `function` sets end with the child.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(seconds)
            torch.set_num_threads(1)  # the threads of the parent's pool are not there
            _write(write, json.dumps(function()))
            os._exit(0)
        except BaseException as error:
            _write(write, f"{type(error).__name__}: {error}"[:4000])
        finally:
            os._exit(2)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as pipe:
        message = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"the child process ended with {status}: {message}"
    return json.loads(message)


def _write(descriptor: int, text: str) -> None:
    rest = text.encode()
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def limit_address_space(allowance: int) -> None:
    """No more than `allowance` bytes beyond what this process has mapped now: call it after every import."""
    if UNMEASURED:
        return
    limit = memory_of("VmSize") + allowance
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
