"""Implementations of rms_norm that tests register, and calls of the operation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qwen35moe import backends


def plain(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return x * weight * eps


def doubled(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return 2 * x * weight * eps


def not_on_cuda(x: Tensor, weight: Tensor, *, eps: float) -> str | None:
    return None if x.is_cuda else f"query is on {x.device}, not on CUDA"


def odd_width(x: Tensor, weight: Tensor, *, eps: float) -> str | None:
    return None if x.shape[-1] % 2 == 0 else f"the width {x.shape[-1]} is odd"


def run(arguments: tuple[Tensor, Tensor], caller: Any = None) -> float:
    """1.0 when `plain` ran on ones, 2.0 when `doubled` ran."""
    return backends.run("rms_norm", *arguments, eps=1.0, caller=caller).max().item()
