"""Block-FP8 weights: 8-bit floats with one scale per block of 128 x 128, as the published FP8 repositories store them.

    weight            F8_E4M3  [rows, columns]
    weight_scale_inv  BF16     [ceil(rows / 128), ceil(columns / 128)]      (the last blocks may be smaller)

    w[r, c] = weight[r, c] * weight_scale_inv[r // 128, c // 128]        in float32, rounded once to the model's dtype

Despite its name, the scale is a factor, not a divisor. A weight is quantised if its dtype is F8_E4M3 and a scale is stored
beside it; the lists in config.json are not used. Zero and negative scales follow the equation; a scale that is not finite
is an error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import BLOCK


def dequantise(values: Tensor, scale: Tensor) -> Tensor:
    """The definition. values [..., rows, columns] float8, scale [..., ceil(rows/128), ceil(columns/128)]; returns float32."""
    rows, columns = values.shape[-2:]
    factor = scale.float().repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :columns]
    return values.float() * factor


def dequantise_rows(values: Tensor, scale: Tensor) -> Tensor:
    """The same for rows [r, columns] that begin at a block boundary, without expanding the scale to every row."""
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
    since the exponents' biases are 7 and 15. The two NaN codes are the exception: with them the plain conversion runs.
    """
    codes = values.view(torch.int8)
    if values.device.type != "cpu" or values.numel() == 0 or int((codes & 0x7F).max()) == 0x7F:
        return values.float()
    moved = codes.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)  # the sign is in bits 15 and 14
    return moved.view(torch.float16).float().mul_(256)
