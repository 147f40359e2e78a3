"""Choices by measurement: which of several forms is the fastest on this machine, found once per process and kind of call.

Processors differ in which form of a product is fast, so nothing is decided by their names. `describe` reports what was
measured. With torch.use_deterministic_algorithms(True) nothing is measured and torch's own form runs: another process could
choose another form, whose last bits differ.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

GAIN = 1.1  # by which another form must be faster than the first to be chosen, in case the machine is not quiet
ROUNDS = 2


@dataclass(frozen=True)
class Measured:
    """The seconds of each form (of the fastest of ROUNDS runs), and the form that was chosen."""

    seconds: Mapping[str, float]
    chosen: str

    def __str__(self) -> str:
        times = ", ".join(f"{name} {1e3 * value:.3g}" for name, value in sorted(self.seconds.items(), key=lambda x: x[1]))
        return f"{self.chosen} (ms: {times})"


MEASURED: dict[str, dict[str, Measured]] = {}  # operation -> kind of call -> result
_lock = threading.RLock()


def fastest(operation: str, kind: str, forms: Mapping[str, Callable[[int], object]]) -> str:
    """The name of the fastest form; the first one unless another is GAIN times faster.

    forms: name -> function of the number of the round, so that each round may read other memory.
    """
    results = MEASURED.setdefault(operation, {})
    with _lock:
        if kind not in results:
            results[kind] = measure(forms)
        return results[kind].chosen


def measure(forms: Mapping[str, Callable[[int], object]]) -> Measured:
    """Run the forms in turn, ROUNDS times, and keep the shortest time of each: the first round also prepares memory."""
    seconds = dict.fromkeys(forms, float("inf"))
    for number in range(ROUNDS):
        for name, form in forms.items():
            start = time.perf_counter()
            form(number)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    first = next(iter(forms))
    best = min(seconds, key=seconds.__getitem__)
    return Measured(seconds, best if seconds[first] > GAIN * seconds[best] else first)


def allowed() -> bool:
    """Whether forms may be chosen by measurement."""
    return not torch.are_deterministic_algorithms_enabled()
