"""The suite's own measures: they see the memory that an operation takes, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.support.memory import LAG, UNMEASURED, anonymous_growth, memory_taken, peak_growth

MIB = 2**20


def small() -> torch.Tensor:
    return torch.ones(1000)


@pytest.mark.skipif(UNMEASURED, reason="reads the page counts of /proc")
@pytest.mark.parametrize("growth", [peak_growth, anonymous_growth])
def test_memory_taken_is_that_of_the_operation(growth: Callable[[Callable[[], object]], int]) -> None:
    """48 MiB are seen although 64 MiB were freed before; a few bytes are few."""
    freed = [bytearray(64 * MIB)]
    freed.clear()
    kept: list[torch.Tensor] = []
    assert 48 * MIB - LAG <= memory_taken(lambda: kept.append(torch.ones(12 * MIB)), small, growth) < 52 * MIB
    assert -LAG <= memory_taken(lambda: kept.append(torch.ones(100)), small, growth) < MIB


@pytest.mark.skipif(UNMEASURED, reason="reads the page counts of /proc")
def test_a_failure_in_the_child_is_reported() -> None:
    def fail() -> None:
        raise ValueError("of the operation")

    with pytest.raises(AssertionError, match="ValueError: of the operation"):
        memory_taken(fail, small)
