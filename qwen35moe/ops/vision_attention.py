"""Attention within each frame: every patch attends to all patches of its frame.

    output = softmax(scale * query key^T) value, frame by frame

Vaswani et al. 2017; the tower is that of Bai et al. 2025, "Qwen3-VL Technical Report".
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen35moe.backends import operation
from qwen35moe.ops.precision import wide_dtype


@operation(name="eager")
def vision_attention(query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens: Tensor, scale: float) -> Tensor:
    """One softmax over all patches with a mask of frames.

    query, key, value [N, H, K]; frame i has the patches cu_seqlens[i] ... cu_seqlens[i + 1] - 1, on any device: on the CPU
    no form waits for a GPU. Returns [N, H, K].
    """
    dtype = wide_dtype(query)
    bounds = cu_seqlens[1:].to(query.device)
    frame = torch.bucketize(torch.arange(query.shape[0], device=query.device), bounds, right=True)
    scores = torch.einsum("nhk,mhk->hnm", query.to(dtype), key.to(dtype)) * scale
    weights = scores.masked_fill(frame[:, None] != frame, float("-inf")).softmax(-1)
    return torch.einsum("hnm,mhk->nhk", weights, value.to(dtype)).to(query.dtype)
