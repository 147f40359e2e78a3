"""Writing block-FP8, as block_fp8.py reads it: the numbers and the factors of a matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import BLOCK, scale_shape

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
    each = scale.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    values = (wide / each).clamp(-LARGEST, LARGEST)
    return values.to(torch.float8_e4m3fn), scale
