"""Attention within each frame with torch's fused attention, and with bfloat16 scores. Contract in `ops.vision_attention`."""

from __future__ import annotations

import math
from itertools import groupby, pairwise

import torch
from torch import Tensor

from qwen35moe.backends.values import host_values
from qwen35moe.ops.cpu.attention import sdpa
from qwen35moe.ops.vision_attention import vision_attention


@vision_attention.implementation("torch", transforms=(), double_backward=False)
def vision_attention_torch(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, scale: float) -> Tensor:
    """torch's fused attention. Consecutive frames of one size, as those of a video, are one call."""
    if query.device.type == "cpu":  # keys and values are read repeatedly, faster if each head is contiguous
        key, value = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (key, value))
    if torch.compiler.is_compiling():  # the sizes of the frames are not known
        bounds = cu_seqlens[1:].to(query.device)
        frame = torch.bucketize(torch.arange(query.shape[0], device=query.device), bounds, right=True)
        q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
        return sdpa(q, k, v, frame[:, None] == frame, scale=scale)[0].transpose(0, 1)
    outputs, start = [], 0
    for size, frames in groupby(stop - begin for begin, stop in pairwise(host_values(cu_seqlens))):
        count = len(list(frames))
        if size == 0:
            continue
        rows = slice(start, start := start + count * size)
        q, k, v = (x[rows].unflatten(0, (count, size)).transpose(1, 2) for x in (query, key, value))
        outputs.append(sdpa(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1))
    if not outputs:
        return torch.empty_like(query)  # no patch
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


_BLOCK = 1 << 21  # scores at once: 4 MB stay in cache
_FEW = 128  # patches per frame, below which fused attention computes many frames at once
_SAMPLED = 8  # the sample for the row maximum has one key of so many
_LARGEST = 256.0  # above this score, a maximum that is not in the sample could be rounded by more than 1


def _cannot_round_scores(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, scale: float) -> str | None:
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return f"query is {query.dtype} on {query.device}, not bfloat16 on a CPU"
    largest = scale * math.prod(torch.linalg.vector_norm(x, dim=-1).max().item() for x in (query, key))
    return f"scores may reach {largest:.0f}, too large to round to bfloat16" if not largest <= _LARGEST else None


def _fused_is_faster(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, scale: float) -> str | None:
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if not capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
        return "faster only on processors with AVX512-bf16 and without AMX, where fused attention computes in float32"
    frames, patches = cu_seqlens.shape[0] - 1, query.shape[0]
    return f"{patches} patches in {frames} frames are fewer than {_FEW} per frame" if patches < _FEW * frames else None


@vision_attention.implementation(
    "bf16_scores", _cannot_round_scores, before="torch", slower=_fused_is_faster, differentiable=False, compiles=False,
    transforms=(),
)
def vision_attention_bf16_scores(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, scale: float) -> Tensor:
    """A block of heads and rows at a time, with scores rounded to bfloat16 as in eager attention, so that both products are
    bfloat16 products, twice as fast as in float32. No backward.

    Softmax is shift-invariant: subtract (approximately) the row maximum before rounding, so that the large scores become small
    numbers and lose little. The maximum over a sample of the keys is one more feature of q, negated, with the feature 1 in k.
    """
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    buffer = query.new_empty(_BLOCK)
    for start, end in pairwise(host_values(cu_seqlens)):
        if size := end - start:
            q, k, v, frame_out = (x[start:end].transpose(0, 1) for x in (query, key, value, out))
            sample = k[:, ::_SAMPLED].mT.contiguous()
            k, v = torch.cat([k, torch.ones_like(k[..., :1])], -1).mT.contiguous(), v.contiguous()
            heads, rows = max(1, _BLOCK // size**2), min(size, max(1, _BLOCK // size))
            for h in range(0, q.shape[0], heads):
                for row in range(0, size, rows):
                    block = q[h : h + heads, row : row + rows]
                    scores = buffer[: block.shape[0] * block.shape[1] * size].view(*block.shape[:2], size)
                    maximum = (block @ sample[h : h + heads]).amax(-1, keepdim=True)
                    block = torch.cat([block, -maximum], -1)
                    torch.baddbmm(scores, block, k[h : h + heads], beta=0, alpha=scale, out=scores)
                    torch.softmax(scores, -1, out=scores)
                    frame_out[h : h + heads, row : row + rows] = scores @ v[h : h + heads]
    return out
