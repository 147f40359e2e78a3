"""M-RoPE: rotary angles of three position axes, time, height and width, interleaved over the frequency pairs.

Bai et al. 2025, "Qwen3-VL Technical Report": frequency pair j is rotated by the time position, except that pairs 1, 4, 7, ...
below 3 * sections[1] are rotated by height and pairs 2, 5, 8, ... below 3 * sections[2] by width. For text the three positions
are equal and the split has no effect.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen35moe.ops.precision import float64_device


def rotary_tables(
    position_ids: Tensor, inv_freq: Tensor, sections: Sequence[int], scale: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, [B, T, R/2] in `dtype` (None: that of inv_freq) on the device of position_ids.

    Angles have the dtype of inv_freq: with float64 (`inverse_frequencies`) and rounded once the tables are correct at every
    position; a float32 angle is off by 0.008 rad at 262,144 rad.

    position_ids [3, B, T]: time, height, width. sections: pairs per axis (mrope_section); those beyond R/2 are ignored.
    """
    device, dtype = position_ids.device, dtype or inv_freq.dtype
    if inv_freq.dtype == torch.float64:
        inv_freq = inv_freq.to(float64_device(device))
    if position_ids.stride(0) == 0:  # one position for all axes, as of text: see `plan_layout`
        position_ids = position_ids[:1]
    angles = position_ids.to(inv_freq.device, inv_freq.dtype)[..., None] * inv_freq  # [1 or 3, B, T, R/2]
    pairs = inv_freq.shape[0]
    angle = angles[0]
    for axis in range(1, len(angles)):
        pair = torch.arange(pairs, device=inv_freq.device)
        uses_axis = (pair % 3 == axis) & (pair < 3 * sections[axis])
        angle = torch.where(uses_axis, angles[axis], angle)
    cos, sin = angle.cos(), angle.sin()
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    return cos.to(dtype=dtype).to(device), sin.to(dtype=dtype).to(device)
