"""Names and shapes of block-FP8 tensors; block_fp8.py has their meaning. This file needs no torch, for `qwen35moe inspect`."""

from __future__ import annotations

BLOCK = 128
FP8 = "F8_E4M3"  # the dtype code of a quantised weight
SCALE = "_scale_inv"  # follows the name of the weight


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scale of a weight [..., rows, columns]."""
    return (*shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK))
