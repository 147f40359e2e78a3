"""Rotary position embedding: partial, with three interleaved position axes, plain or stretched by YaRN.

Su et al. 2021 (RoPE); Peng et al. 2023 (YaRN); the interleaved three-axis form is Qwen3-VL's: frequency pair j turns
with the time axis, except that pairs 1, 4, 7, ... below 3 * section[1] turn with height and pairs 2, 5, 8, ... below
3 * section[2] with width. For text the three axes are equal and the split has no effect.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qwen35moe import backends
from qwen35moe.config import RopeParameters
from qwen35moe.ops.precision import wide_dtype


def inverse_frequencies(
    rope: RopeParameters, rotary_dim: int, max_position_embeddings: int, *, dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Tensor, float]:
    """The angle per position of each frequency pair, and the factor on cos and sin.

    default: theta^(-2j/R) for j < R/2 and 1. yarn: see `_yarn`. Returns ([R/2] in `dtype`, scale).
    """
    exponent = torch.arange(0, rotary_dim, 2, dtype=dtype, device=device) / rotary_dim
    plain = 1.0 / (rope.rope_theta**exponent)
    if rope.rope_type == "default":
        return plain, 1.0
    return _yarn(plain, rope, rotary_dim, max_position_embeddings)


def _yarn(plain: Tensor, rope: RopeParameters, rotary_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """YaRN: pairs that turn often within the trained context keep their frequency, slow ones are divided by `factor`.

    Between the pair that makes beta_fast turns over the original context and the one that makes beta_slow, the two
    blend linearly (Peng et al. 2023, eq. 17-23). The attention temperature 0.1 ln(factor) + 1 scales cos and sin.
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
        high += 0.001  # a ramp of no width would divide by zero
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


def rotary_tables(
    position_ids: Tensor, inv_freq: Tensor, sections: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, [B, T, R/2] in the dtype of inv_freq (float32 at least: an angle of 10^5 rad has
    no correct digit in bfloat16).

    position_ids [3, B, T]: time, height, width. `sections` may name more pairs than there are; the rest is cut off.
    """
    angles = position_ids.to(inv_freq.dtype)[..., None] * inv_freq  # [3, B, T, R/2]
    pairs = inv_freq.shape[0]
    angle = angles[0]
    for axis in (1, 2):
        owned = torch.arange(pairs, device=inv_freq.device)
        owned = (owned % 3 == axis) & (owned < 3 * sections[axis])
        angle = torch.where(owned, angles[axis], angle)
    return angle.cos() * scale, angle.sin() * scale


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turns the first R entries of each head: pair (x_j, x_{j + R/2}) by the angle of its position; the rest passes.

    query [B, T, H, K], key [B, T, G, K], cos and sin [B, T, R/2]; returns both in their own dtype.
    """
    return _turn(query, cos, sin), _turn(key, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    dtype = wide_dtype(x)
    cos, sin = cos[:, :, None].to(dtype), sin[:, :, None].to(dtype)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    first, second = first.to(dtype), second.to(dtype)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([*(part.to(x.dtype) for part in turned), rest], dim=-1)


_BLOCK = 1 << 17  # numbers turned at once: with what they are made of they stay in cache
_FEW = 64  # tokens: below, the definition's temporaries are no larger


def inplace_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotary` without a backward, a block of tokens at a time in memory of its own. What is returned lies head after head
    in memory, as attention reads it."""
    return _turn_by_blocks(query, cos, sin), _turn_by_blocks(key, cos, sin)


def _turn_by_blocks(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (batch, tokens, heads, width), half = x.shape, cos.shape[-1]
    dtype = wide_dtype(x)
    cos, sin = (part[:, :, None].to(dtype).expand(batch, -1, -1, -1) for part in (cos, sin))
    out = torch.empty(batch, heads, tokens, width, dtype=x.dtype, device=x.device).transpose(1, 2)
    out[..., 2 * half :] = x[..., 2 * half :]
    step = max(1, _BLOCK // (batch * heads * 2 * half))
    wide, turned = torch.empty(2, batch, min(step, tokens), heads, 2 * half, dtype=dtype, device=x.device)
    for start in range(0, tokens, step):
        here = slice(start, min(start + step, tokens))
        count = here.stop - start
        c, s = cos[:, here], sin[:, here]
        a, b = wide[:, :count].copy_(x[:, here, :, : 2 * half]).chunk(2, dim=-1)
        first, second = turned[:, :count].chunk(2, dim=-1)
        torch.mul(a, c, out=first).addcmul_(b, s, value=-1)
        torch.mul(b, c, out=second).addcmul_(a, s)
        out[:, here, :, : 2 * half] = turned[:, :count]
    return out


def _cannot_be_in_place(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    if query.device.type != "cpu":
        return f"query is on {query.device}, not on a CPU"
    if torch.compiler.is_compiling():
        return "a graph is being compiled"
    return f"{query.shape[1]} tokens are few" if query.shape[1] < _FEW else None


def _cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Iterator[tuple[tuple, dict]]:
    for batch, tokens, heads, groups, width, pairs in ((2, 5, 6, 3, 16, 4), (1, 3, 2, 1, 12, 6), (2, 70, 2, 1, 12, 5)):
        query = torch.randn(batch, tokens, heads, width, generator=generator, dtype=torch.float64)
        key = torch.randn(batch, tokens, groups, width, generator=generator, dtype=torch.float64)
        angle = 6.3 * torch.rand(batch, tokens, pairs, generator=generator, dtype=torch.float64)
        table = torch.promote_types(torch.float32, dtype)
        yield (
            query.to(device, dtype), key.to(device, dtype), angle.cos().to(device, table), angle.sin().to(device, table)
        ), {}


backends.register("rotary", "cpu", inplace_rotary, _cannot_be_in_place, differentiable=False)
backends.register("rotary", "torch", rotary)
backends.add_cases("rotary", rotary, _cases)
