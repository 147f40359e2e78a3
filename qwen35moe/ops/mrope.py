"""M-RoPE: rotary angles of three position axes, time, height and width, interleaved over the frequency pairs.

Bai et al. 2025, "Qwen3-VL Technical Report": frequency pair j is rotated by the time position, except that pairs 1, 4, 7, ...
below 3 * sections[1] are rotated by height and pairs 2, 5, 8, ... below 3 * sections[2] by width. For text the three positions
are equal and the split has no effect.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rotary_tables(
    position_ids: Tensor, inv_freq: Tensor, sections: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, [B, T, R/2] in the dtype of inv_freq (float32 at least: an angle of 10^5 rad has
    no correct digit in bfloat16).

    position_ids [3, B, T]: time, height, width. sections: pairs per axis (mrope_section); those beyond R/2 are ignored.
    """
    angles = position_ids.to(inv_freq.dtype)[..., None] * inv_freq  # [3, B, T, R/2]
    pairs = inv_freq.shape[0]
    angle = angles[0]
    for axis in (1, 2):
        pair = torch.arange(pairs, device=inv_freq.device)
        uses_axis = (pair % 3 == axis) & (pair < 3 * sections[axis])
        angle = torch.where(uses_axis, angles[axis], angle)
    return angle.cos() * scale, angle.sin() * scale
