"""Quantisation of a matrix to block-FP8: the values and the scale that block_fp8.py multiplies."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import BLOCK, scale_shape

LARGEST = 448.0  # of float8_e4m3fn; a conversion turns larger numbers into NaN, not infinity


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(values, scale) for a weight [rows, columns]: the scale of a block maps its largest number to 448.

    The scale is rounded to bfloat16 first and the numbers are divided by the rounded scale, so that its rounding costs
    nothing; if it was rounded down, the largest number is clamped to 448 (by at most 0.4 %). A block of zeros has scale 1.
    ValueError for NaN and infinity, which no scale can represent.
    """
    rows, columns = weight.shape
    down, across = scale_shape((rows, columns))
    wide = weight.float()
    if not torch.isfinite(wide).all():
        raise ValueError(f"a weight {list(weight.shape)} with NaN or infinity has no block-FP8 form")
    blocks = F.pad(wide, (0, across * BLOCK - columns, 0, down * BLOCK - rows)).view(down, BLOCK, across, BLOCK)
    scale = (blocks.abs().amax(dim=(1, 3)) / LARGEST).bfloat16()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    divisor = scale.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    values = (wide / divisor).clamp(-LARGEST, LARGEST)
    return values.to(torch.float8_e4m3fn), scale
