"""Block-FP8 weights: 8-bit floats with one factor per block of 128 x 128, as the published FP8 repositories store them.

    weight            F8_E4M3  [R, C]
    weight_scale_inv  BF16     [ceil(R / 128), ceil(C / 128)]      (the last blocks are what is left)

    w[r, c] = weight[r, c] * weight_scale_inv[r // 128, c // 128]        in float32, rounded once to the model's dtype

The name notwithstanding, the factor is multiplied. Whether a weight is quantised is told by its dtype and by the scale
beside it, never by the lists in config.json. Zero and negative factors mean what the equation says; a factor that is not
finite means nothing and is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import BLOCK

VALUES = torch.float8_e4m3fn  # a weight's numbers, which files call blocks.CODE


def dequantise(values: Tensor, scale: Tensor) -> Tensor:
    """The definition: values [..., R, C] float8, scale [..., ceil(R/128), ceil(C/128)]; returns float32 [..., R, C]."""
    rows, columns = values.shape[-2:]
    factor = scale.float().repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :columns]
    return values.float() * factor


def dequantise_rows(values: Tensor, scale: Tensor) -> Tensor:
    """The same for some rows [r, C] that begin with a block, with a factor per block row and column only."""
    rows, columns = values.shape
    product = widened(values)
    across = scale.repeat_interleave(BLOCK, 1)[:, :columns]
    whole = rows // BLOCK * BLOCK
    product[:whole].view(-1, BLOCK, columns).mul_(across[: whole // BLOCK, None])
    if whole < rows:
        product[whole:].mul_(across[-1])
    return product


def widened(values: Tensor) -> Tensor:
    """values.float(), five times as fast on a CPU, where that conversion takes 5 ns per number.

    A code s eeee mmm, moved to s 0eeee mmm0000000, is the float16 of 2^-8 times its value, subnormal numbers included,
    since the exponents' biases are 7 and 15. Only the two codes that are no number would become one.
    """
    codes = values.view(torch.int8)
    if values.device.type != "cpu" or values.numel() == 0 or int((codes & 0x7F).max()) == 0x7F:
        return values.float()
    moved = codes.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)  # the sign stands in bits 15 and 14
    return moved.view(torch.float16).float().mul_(256)
