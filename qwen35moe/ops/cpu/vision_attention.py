"""Attention within each frame through torch's fused attention, and with bfloat16 scores. Contract in `ops.vision_attention`."""

from __future__ import annotations

import math
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.ops.vision_attention import vision_attention


@vision_attention.implementation("torch")
def vision_attention_torch(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, scale: float) -> Tensor:
    """torch's fused attention. Neighbouring frames of one size, as those of a video, are one call."""
    if query.device.type == "cpu":  # keys and values are read over and over, and faster where a head lies together
        key, value = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (key, value))
    outputs, start = [], 0
    for size, frames in groupby(end - begin for begin, end in pairwise(cu_seqlens.tolist())):
        count = len(list(frames))
        if size == 0:
            continue
        rows = slice(start, start := start + count * size)
        q, k, v = (x[rows].unflatten(0, (count, size)).transpose(1, 2) for x in (query, key, value))
        outputs.append(F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


_BLOCK = 1 << 21  # scores formed at once: 4 MB stay in cache
_FEW = 128  # patches in a frame: below, fused attention takes many frames at once
_SAMPLED = 8  # one key in so many is in the sample for the row maximum
_LARGEST = 256.0  # beyond this score, a maximum that the sample missed could be rounded by more than 1


def _cannot_round_scores(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, scale: float) -> str | None:
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return f"query is {query.dtype} on {query.device}, not bfloat16 on a CPU"
    largest = scale * math.prod(torch.linalg.vector_norm(x, dim=-1).max().item() for x in (query, key))
    return f"scores may reach {largest:.0f}, which is too much to round to bfloat16" if not largest <= _LARGEST else None


def _fused_is_faster(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, scale: float) -> str | None:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if not capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
        return "measured faster on processors with AVX512-bf16 and without AMX only, where fused attention works in float32"
    frames = cu_seqlens.shape[0] - 1
    return f"{query.shape[0]} patches in {frames} frames are few in each" if query.shape[0] < _FEW * frames else None


@vision_attention.implementation(
    "bf16_scores", _cannot_round_scores, before="torch", slower=_fused_is_faster, differentiable=False, compiles=False
)
def vision_attention_bf16_scores(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Some heads or rows at a time, without a backward, its scores rounded to bfloat16 as an eager attention's are: both
    products are then bfloat16's own, at twice the speed of float32's.

    Softmax is shift-invariant: subtract (approximately) the row maximum before rounding, so that the scores that matter are
    small and lose little. The maximum is that of a sample of the keys, rounded; it enters the product's float32 sums as one
    more feature of q, with 1 in k.
    """
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    memory = query.new_empty(_BLOCK)
    for start, end in pairwise(cu_seqlens.tolist()):
        if size := end - start:
            q, k, v, into = (x[start:end].transpose(0, 1) for x in (query, key, value, out))
            sample = k[:, ::_SAMPLED].mT.contiguous()
            k, v = torch.cat([k, torch.ones_like(k[..., :1])], -1).mT.contiguous(), v.contiguous()
            heads, rows = max(1, _BLOCK // size**2), min(size, max(1, _BLOCK // size))
            for h in range(0, q.shape[0], heads):
                for row in range(0, size, rows):
                    some = q[h : h + heads, row : row + rows]
                    scores = memory[: some.shape[0] * some.shape[1] * size].view(*some.shape[:2], size)
                    near_largest = (some @ sample[h : h + heads]).amax(-1, keepdim=True)
                    some = torch.cat([some, -near_largest], -1)
                    torch.baddbmm(scores, some, k[h : h + heads], beta=0, alpha=scale, out=scores)
                    torch.softmax(scores, -1, out=scores)
                    into[h : h + heads, row : row + rows] = scores @ v[h : h + heads]
    return out
