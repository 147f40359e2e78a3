"""Measured limits of the machine: read and copy bandwidth, rate of a matrix product, size of the cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

_COPY = 256 << 20  # bytes of the copied buffer
_WIDTH = {"cpu": 2048, "cuda": 8192}  # of the square product


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 32 MB if the system does not report it."""
    sizes = [int(file.read_text()[:-2]) << 10 for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=32 << 20)


def measured(device: str, dtype: torch.dtype) -> dict[str, float]:
    """copy_gbps: read and written bytes of a large copy; read_gbps: of a sum; matmul_tflops: a square product in dtype."""
    kind = torch.device(device).type
    source = torch.ones(_COPY // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    width = _WIDTH.get(kind, 2048)
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    return {
        "copy_gbps": 2 * _COPY / _best(lambda: target.copy_(source), kind) / 1e9,
        "read_gbps": _COPY / _best(lambda: source.sum(), kind) / 1e9,
        "matmul_tflops": 2 * width**3 / _best(lambda: a @ b.t(), kind) / 1e12,
    }


def _best(run: Callable[[], object], kind: str, times: int = 7) -> float:
    seconds = []
    for _ in range(times + 2):
        start = time.perf_counter()
        run()
        if kind == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[2:])
