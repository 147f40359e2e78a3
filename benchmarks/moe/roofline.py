"""The bytes and flops of a case, and the least time that they take on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from benchmarks.moe.cases import DTYPES, Case


def work(case: Case, indices: Tensor) -> dict[str, float]:
    """flops and bytes of a case. Only the distinct experts hit are read; inputs are read and outputs written once.

    forward: 6 D F for each (token, expert) assignment. backward: twice that; the weights are read once more, and their
    gradients written once.
    """
    experts, top_k, width, inner = case.shape
    distinct = int(indices.unique().numel())
    size = DTYPES[case.dtype].itemsize
    expert, tokens = 3 * width * inner * size, 2 * case.tokens * width * size
    flops = 6 * case.tokens * top_k * width * inner
    if not case.train:
        return {"flops": flops, "bytes": distinct * expert + tokens, "distinct_experts": distinct}
    return {"flops": 3 * flops, "bytes": (2 * distinct + experts) * expert + 2 * tokens, "distinct_experts": distinct}


def limit(work: Mapping[str, float], roof: Mapping[str, Any]) -> float:
    """The least seconds on this machine: bytes over the read bandwidth, flops over the rate of the fastest product."""
    return max(work["bytes"] / roof["read_gbps"] / 1e9, work["flops"] / roof["product_tflops"] / 1e12)
