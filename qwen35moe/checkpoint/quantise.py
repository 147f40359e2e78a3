"""Writing block-FP8: a matrix as 8-bit numbers and one scale for each block of 128 x 128 of them.

    w[i, j] = q[i, j] * s[i // 128, j // 128]          q: float8_e4m3fn, |q| <= 448;  s: bfloat16, on disk `weight_scale_inv`

The blocks at the right and lower edge are smaller where 128 does not divide the shape.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .published import BLOCK, scale_shape

LARGEST = 448.0  # of float8_e4m3fn; what lies beyond becomes NaN in a conversion, not infinity


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(q, s) for a weight [R, C]: each block is scaled so that its largest number becomes 448.

    The scale is rounded to bfloat16 first and the numbers are divided by what it became, so that its rounding costs
    nothing; where it was rounded down, the largest number is cut to 448 (by 0.4 % at most). A block of zeros has scale 1.
    ValueError for NaN and infinity, which no scale can hold.
    """
    rows, columns = weight.shape
    down, across = scale_shape((rows, columns))
    wide = weight.float()
    if not torch.isfinite(wide).all():
        raise ValueError(f"a weight {list(weight.shape)} with NaN or infinity has no block-FP8 form")
    blocks = F.pad(wide, (0, across * BLOCK - columns, 0, down * BLOCK - rows)).view(down, BLOCK, across, BLOCK)
    scale = (blocks.abs().amax(dim=(1, 3)) / LARGEST).bfloat16()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    values = (wide / _per_element(scale, rows, columns)).clamp(-LARGEST, LARGEST)
    return values.to(torch.float8_e4m3fn), scale


def dequantise(values: Tensor, scale: Tensor) -> Tensor:
    """q * s in float32 [R, C], for values [R, C] and scale [ceil(R/128), ceil(C/128)]."""
    return values.float() * _per_element(scale, *values.shape)


def _per_element(scale: Tensor, rows: int, columns: int) -> Tensor:
    """The scales in float32, repeated over their blocks: [R, C]."""
    return scale.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
