"""What the steps share: the device, times of its stream, profiles, synchronisations."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.tools.common import Timing, interleave
from qwen35moe import backends

TOP = 10  # kernels of a profile


@dataclass
class Work:
    """limit: seconds of the step. wheels: the folder of --wheels."""

    small: bool
    limit: float
    out: Path
    wheels: str | None = None
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        if self.small and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(2)

    @property
    def device(self) -> str:
        return "cpu" if self.small else "cuda"

    @property
    def left(self) -> float:
        """Seconds until the step is ended."""
        return self.started + self.limit - time.time()

    def sync(self) -> None:
        if not self.small:
            torch.cuda.synchronize()

    def own_kernels(self) -> AbstractContextManager[Any]:
        """Within the context our kernels compute the delta rule: "auto" prefers fla where it is installed."""
        return nullcontext() if self.small else backends.use(gated_delta_rule="triton")

    def time(self, implementations: dict[str, Callable[[], object]], rounds: int = 9, warmup: int = 2) -> dict[str, Timing]:
        """Seconds of each implementation, in turns; few rounds in the small form."""
        rounds, warmup = (2, 1) if self.small else (rounds, warmup)
        gc.collect()
        gc.freeze()  # the collection before each run then visits new objects only: all of them take 0.1 to 0.2 s
        try:
            return interleave(implementations, rounds=rounds, warmup=warmup, device=self.device)
        finally:
            gc.unfreeze()

    def free(self) -> None:
        """Give the allocator's memory back before a step that needs much."""
        gc.collect()
        if not self.small:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Bytes of the device's memory at most since `free`."""
        return 0 if self.small else torch.cuda.max_memory_allocated()

    def profile(self, function: Callable[[], object], times: int = 1) -> dict[str, Any]:
        """top: [name, ms, launches] of the kernels with most time, per call; launches and device_ms: of all.

        On a CPU, PyTorch's operators and their own time.
        """
        from torch.profiler import ProfilerActivity, profile

        kind = ProfilerActivity.CPU if self.small else ProfilerActivity.CUDA
        function()
        self.sync()
        with profile(activities=[kind]) as recorded:
            for _ in range(times):
                function()
            self.sync()
        totals: dict[str, list[float]] = {}
        for event in recorded.events():  # pyright: ignore[reportOptionalIterable]
            if not self.small and event.device_type.name != "CUDA":
                continue
            spent = event.self_cpu_time_total if self.small else event.time_range.elapsed_us()
            total = totals.setdefault(event.name, [0.0, 0.0])
            total[0] += spent / 1e3 / times
            total[1] += 1 / times
        ordered = sorted(totals.items(), key=lambda item: -item[1][0])
        return {
            "top": [[name[:60], round(ms, 4), round(count, 1)] for name, (ms, count) in ordered[:TOP]],
            "launches": round(sum(count for _, count in totals.values())),
            "device_ms": round(sum(ms for ms, _ in totals.values()), 4),
        }

    @contextmanager
    def no_synchronisation(self) -> Iterator[None]:
        """Within the context a synchronisation of the host with the GPU raises."""
        if self.small:
            yield
            return
        self.sync()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def rates(timing: Timing, **more: Any) -> dict[str, Any]:
    """The facts of a row that make up a report's implementation."""
    return {"min_s": timing.min, "median_s": timing.median, "runs": len(timing.seconds), **more}
