"""Targets of speeds by GPU. They are set for an H200; an H100 reads memory at 0.8 of its rate, and computes as fast."""

from __future__ import annotations

# Substrings of a GPU's name -> share of an H200's memory bandwidth. Another GPU has no absolute targets, only ratios.
BANDWIDTH = {"H200": 1.0, "H100": 0.8}

MOE_TFLOPS = 400.0  # forward, 32,768 tokens: bound by products
MOE_RATIO, MOE_TRAIN_RATIO = 1.6, 1.5  # grouped_mm's time over ours
DELTA_RATIO = 1.3  # ours over fla's time
DECODE = 220.0  # tokens per second at batch 1, captured: bound by memory
LAUNCHES = 700.0  # of a step of 40 layers
LOADING = 10.0  # GB/s from the page cache: bound by the host and PCIe


def bandwidth(gpu: str) -> float | None:
    """Share of an H200's memory bandwidth, None for another GPU."""
    return next((share for name, share in BANDWIDTH.items() if name in gpu), None)


def memory_bound(target: float, gpu: str) -> float | None:
    """A rate's target on this GPU where memory limits it."""
    share = bandwidth(gpu)
    return None if share is None else target * share


def compute_bound(target: float, gpu: str) -> float | None:
    return None if bandwidth(gpu) is None else target
