"""Attention within each picture: every patch of a frame sees all patches of that frame and no other.

    output = softmax(scale * query key^T) value, frame by frame

Vaswani et al. 2017; the tower is that of Bai et al. 2025, "Qwen3-VL Technical Report".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe import backends
from qwen35moe.ops.precision import wide_dtype


def eager_vision_attention(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, scale: float) -> Tensor:
    """The definition: one softmax over all patches, in which other frames have no weight.

    query, key, value [N, H, K], frame f being [cu_seqlens[f], cu_seqlens[f + 1]); returns [N, H, K].
    """
    dtype = wide_dtype(query)
    frame = torch.bucketize(torch.arange(query.shape[0], device=query.device), cu_seqlens[1:], right=True)
    scores = torch.einsum("nhk,mhk->hnm", query.to(dtype), key.to(dtype)) * scale
    weights = scores.masked_fill(frame[:, None] != frame, float("-inf")).softmax(-1)
    return torch.einsum("hnm,mhk->nhk", weights, value.to(dtype)).to(query.dtype)


def vision_attention(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, scale: float) -> Tensor:
    """The same through torch's fused attention. Neighbouring frames of one size, as those of a video, are one call."""
    if query.device.type == "cpu":  # keys and values are read over and over, and faster where a head lies together
        key, value = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (key, value))
    outputs, start = [], 0
    for size, frames in groupby(end - begin for begin, end in pairwise(cu_seqlens.tolist())):
        count = len(list(frames))
        if size == 0:
            continue
        here = slice(start, start := start + count * size)
        q, k, v = (x[here].unflatten(0, (count, size)).transpose(1, 2) for x in (query, key, value))
        outputs.append(F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


_BLOCK = 1 << 21  # scores formed at once: 4 MB stay in cache
_FEW = 128  # patches in a frame: below, fused attention takes many frames at once
_SAMPLED = 8  # every so many keys are looked at for the largest score of a row
_LARGEST = 256.0  # a score; beyond, a largest one that the sample missed could be rounded by more than 1


def rounded_vision_attention(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, scale: float) -> Tensor:
    """The same without a backward, some heads or rows at a time, its scores rounded to the dtype of the inputs as an eager
    attention's are: both products are then bfloat16's own, at twice the speed of float32's.

    What is rounded is q k^T - m. The softmax takes no notice of a number m of the row's own, but where m is near the largest
    score, those that matter are small and lose little. m is the largest of a sample, rounded; as another feature of q, with
    1 in k, it goes through the product's float32 sums.
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


def _cannot_round_scores(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, scale: float) -> str | None:
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return f"query is {query.dtype} on {query.device}, not bfloat16 on a CPU"
    if torch.compiler.is_compiling():
        return "a graph is being compiled"
    largest = scale * math.prod(torch.linalg.vector_norm(x, dim=-1).max().item() for x in (query, key))
    return f"scores may reach {largest:.0f}, which is too much to round to bfloat16" if not largest <= _LARGEST else None


def _fused_is_faster(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, scale: float) -> str | None:
    known = getattr(torch.cpu, "get_capabilities", dict)()
    if not known.get("avx512_bf16") or known.get("amx_bf16"):
        return "measured faster on processors with AVX512-bf16 and without AMX only, where fused attention works in float32"
    frames = cu_seqlens.shape[0] - 1
    return f"{query.shape[0]} patches in {frames} frames are few in each" if query.shape[0] < _FEW * frames else None


def _cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Iterator[tuple[tuple, dict]]:
    for bounds in ([0, 4, 5, 13], [0, 3, 3, 8, 13], [0, 13]):
        tensors = [torch.randn(13, 3, 8, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(3)]
        yield tuple(tensors), {"cu_seqlens": torch.tensor(bounds, device=device), "scale": 0.3}


backends.register(
    "vision_attention", "bf16_scores", rounded_vision_attention, _cannot_round_scores,
    differentiable=False, slower=_fused_is_faster,
)  # fmt: skip
backends.register("vision_attention", "torch", vision_attention)
backends.add_cases("vision_attention", eager_vision_attention, _cases)
