"""Rotary position embedding of the first R entries of each head, plain or stretched by YaRN.

Su et al. 2021 (RoPE); Peng et al. 2023 (YaRN). The three position axes of images are in `ops.mrope`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qwen35moe.backends import operation
from qwen35moe.config import RopeParameters
from qwen35moe.ops.norm import rms_norm
from qwen35moe.ops.precision import float64_device, wide_dtype


def inverse_frequencies(
    rope: RopeParameters, rotary_dim: int, max_position_embeddings: int, *, dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, float]:
    """The angle per position of each frequency pair [R/2], computed in `dtype`, and the scale of cos and sin.

    In float64, because at position 262,144 a float32 frequency is an error of up to 0.01 rad.
    default: theta^(-2j/R) for j < R/2, and 1. yarn: see `_yarn`.
    """
    if dtype == torch.float64:
        device = float64_device(torch.device(device))
    exponent = torch.arange(0, rotary_dim, 2, dtype=dtype, device=device) / rotary_dim
    plain = 1.0 / (rope.rope_theta**exponent)
    if rope.rope_type == "default":
        return plain, 1.0
    return _yarn(plain, rope, rotary_dim, max_position_embeddings)


def _yarn(plain: Tensor, rope: RopeParameters, rotary_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """YaRN: fast pairs keep their frequency, those of slow pairs are divided by `factor`.

    Fast pairs make at least beta_fast turns over the original context, slow pairs at most beta_slow; between them the two
    frequencies are blended linearly (Peng et al. 2023, eq. 17-23). cos and sin are scaled by the attention temperature
    0.1 ln(factor) + 1.
    """
    original = rope.original_max_position_embeddings or max_positions
    factor = rope.factor or max_positions / original

    def pair_with(turns: float) -> float:
        return rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair_with(rope.beta_fast or 32.0), pair_with(rope.beta_slow or 1.0)
    if rope.truncate is None or rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001  # avoids a division by zero
    index = torch.arange(rotary_dim // 2, dtype=plain.dtype, device=plain.device)
    slow = ((index - low) / (high - low)).clamp(0, 1)
    return plain * (1 - slow) + plain / factor * slow, _yarn_temperature(rope, factor)


def _yarn_temperature(rope: RopeParameters, factor: float) -> float:
    if rope.attention_factor is not None:
        return float(rope.attention_factor)

    def magnitude(scale: float, slope: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * slope * math.log(scale) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(factor, rope.mscale) / magnitude(factor, rope.mscale_all_dim)
    return magnitude(factor)


@operation
def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the first R entries of each head: pair (x_j, x_{j + R/2}) by the angle of its position; the rest is unchanged.

    query [B, T, H, K], key [B, T, G, K], cos and sin [B, T, R/2]; returns both in their own dtype.
    """
    return _rotated(query, cos, sin), _rotated(key, cos, sin)


@operation(composes=("rms_norm", "rotary"))
def norm_rotary(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, query_weight: Tensor, key_weight: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """rotary(rms_norm(query), rms_norm(key)), each head normalised over its K entries.

    query [B, T, H, K], key [B, T, G, K], cos and sin [B, T, R/2], query_weight and key_weight [K]; returns both in their own
    dtype.
    """
    query = rms_norm.definition(query, query_weight, eps=eps)
    return rotary.definition(query, rms_norm.definition(key, key_weight, eps=eps), cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    dtype = wide_dtype(x)
    cos, sin = cos[:, :, None].to(dtype), sin[:, :, None].to(dtype)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    first, second = first.to(dtype), second.to(dtype)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([*(part.to(x.dtype) for part in rotated), rest], dim=-1)
