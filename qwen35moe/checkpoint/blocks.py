"""How block-FP8 is told and how large its factors are; block_fp8.py has what they mean. Without torch, for `inspect`."""

from __future__ import annotations

BLOCK = 128
CODE = "F8_E4M3"
SCALE = "_scale_inv"  # after the name of the weight


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the factors of a weight [..., R, C]."""
    return (*shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK))
