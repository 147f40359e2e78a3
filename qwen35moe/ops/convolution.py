"""The short causal convolution in front of the delta rule: each channel mixes its own last W inputs, then SiLU.

    y_t = silu(sum_w weight[:, w] * x_{t - W + 1 + w})

`state` [B, C, W-1] holds the inputs before a row's first token (zeros when None); the last W - 1 inputs are returned as the
next state, for a right-padded row (`lengths`) those before its padding. Packed documents (`cu_seqlens`, B = 1) are independent:
each has its own row of state.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.backends import operation
from qwen35moe.ops.precision import wide_dtype


@operation(name="direct")
def short_convolution(
    x: Tensor, weight: Tensor, *, state: Tensor | None = None, lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = silu(sum_w weight[:, w] * x_{t - W + 1 + w}): one row or document at a time, one tap at a time.

    x [B, T, C], weight [C, W]; returns (y [B, T, C] in x's dtype, state [B or documents, C, W-1] in x's dtype).
    """
    taps = weight.shape[-1]
    spans = _spans(x, lengths, cu_seqlens)
    dtype = wide_dtype(x, weight)
    wide = weight.to(dtype)  # once: the gradients of several casts would be summed in the weight's dtype
    rows: list[list[Tensor]] = [[] for _ in range(x.shape[0])]
    states = []
    for index, (row, start, end) in enumerate(spans):
        before = x.new_zeros(taps - 1, x.shape[-1]) if state is None else state[index].mT.to(x.dtype)
        inputs = torch.cat([before, x[row, start:end]])
        wide_inputs = inputs.to(dtype)
        total = sum(wide_inputs[w : w + end - start] * wide[:, w] for w in range(taps))
        rows[row].append(F.silu(total))  # pyright: ignore[reportArgumentType]
        states.append(inputs[inputs.shape[0] - (taps - 1) :].mT)
    y = torch.stack([_padded(parts, x) for parts in rows]) if x.numel() else x
    return y.to(x.dtype), torch.stack(states) if states else x.new_zeros(0, x.shape[-1], taps - 1)


def _padded(parts: list[Tensor], x: Tensor) -> Tensor:
    """One row's outputs, with zeros at the positions of padding: [T, C]."""
    row = torch.cat(parts)
    return F.pad(row, (0, 0, 0, x.shape[1] - row.shape[0]))


def _spans(x: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None) -> list[tuple[int, int, int]]:
    """(row, start, end) of each row or document."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        return [(0, start, end) for start, end in pairwise(bounds)]
    ends = [x.shape[1]] * x.shape[0] if lengths is None else lengths.tolist()
    return [(row, 0, end) for row, end in enumerate(ends)]
