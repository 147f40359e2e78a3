"""The short causal convolution in front of the delta rule: each channel mixes its own last W inputs, then SiLU.

    y_t = silu(sum_w weight[:, w] * x_{t - W + 1 + w})

A row's inputs before its first token come from `state` [B, C, W-1] (zeros when None), and its last W - 1 inputs are
returned as the next state. A right-padded row (`lengths`) leaves the inputs before its padding; packed documents
(`cu_seqlens`, B = 1) each have their own row of state and see nothing of each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe import backends
from qwen35moe.ops.precision import wide_dtype

_BLOCK_BYTES = 2 << 20  # a CPU works through as many tokens at once as keep the float32 sums in cache


def direct_short_convolution(
    x: Tensor, weight: Tensor, *, state: Tensor | None = None, lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: one row or document at a time, one tap at a time.

    x [B, T, C], weight [C, W]; returns (y [B, T, C] in x's dtype, state [B or documents, C, W-1] in x's dtype).
    """
    taps = weight.shape[-1]
    spans = _spans(x, lengths, cu_seqlens)
    dtype = wide_dtype(x, weight)
    y, states = torch.zeros_like(x, dtype=dtype), []
    for index, (row, start, end) in enumerate(spans):
        before = x.new_zeros(taps - 1, x.shape[-1]) if state is None else state[index].mT.to(x.dtype)
        inputs = torch.cat([before, x[row, start:end]])
        total = sum(inputs[w : w + end - start].to(dtype) * weight[:, w].to(dtype) for w in range(taps))
        y[row, start:end] = F.silu(total)  # pyright: ignore[reportArgumentType]
        states.append(inputs[inputs.shape[0] - (taps - 1) :].mT)
    return y.to(x.dtype), torch.stack(states)


def _spans(x: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None) -> list[tuple[int, int, int]]:
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        return [(0, start, end) for start, end in pairwise(bounds)]
    ends = [x.shape[1]] * x.shape[0] if lengths is None else lengths.tolist()
    return [(row, 0, end) for row, end in enumerate(ends)]


def short_convolution(
    x: Tensor, weight: Tensor, *, state: Tensor | None = None, lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same as shifted products over all rows and documents at once. Arguments and results as in the definition.

    Positions past a row's length hold a convolution of whatever the padding holds.
    """
    taps, channels = weight.shape[-1], x.shape[-1]
    past = taps - 1
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    before = x.new_zeros(rows, past, channels) if state is None else state.mT.to(x.dtype)
    if cu_seqlens is not None:
        return _packed(x, weight, before, cu_seqlens)
    return _shifted_sum(torch.cat([before, x], dim=1), weight), _last_inputs(before, x, lengths)


def _packed(x: Tensor, weight: Tensor, before: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Every document is given its own W - 1 inputs in front, then all are convolved as one row."""
    past, tokens = weight.shape[-1] - 1, x.shape[1]
    bounds = cu_seqlens.to(x.device)
    documents = bounds.shape[0] - 1
    order = torch.arange(documents, device=x.device)
    document = torch.repeat_interleave(order, bounds.diff(), output_size=tokens)
    place = torch.arange(tokens, device=x.device) + past * (document + 1)
    tap = torch.arange(past, device=x.device)
    front = (bounds[:-1] + past * order)[:, None] + tap
    inputs = x.new_zeros(1, tokens + past * documents, x.shape[-1])
    inputs = inputs.index_copy(1, place, x).index_copy(1, front.flatten(), before.reshape(1, -1, x.shape[-1]))
    end = (bounds[1:] + past * order)[:, None] + tap  # the last W - 1 inputs of each document, its front included
    last = inputs[0, end]
    return _shifted_sum(inputs, weight).index_select(1, place - past), last.mT


def _shifted_sum(inputs: Tensor, weight: Tensor) -> Tensor:
    """silu(sum_w weight[:, w] * inputs[:, t + w]) for t = 0 ... T - 1, where inputs has T + W - 1 tokens."""
    taps, channels = weight.shape[-1], inputs.shape[-1]
    tokens = inputs.shape[1] - taps + 1
    dtype = wide_dtype(inputs, weight)
    columns = weight.to(dtype).T.contiguous()
    step = tokens
    if inputs.device.type == "cpu":
        step = max(1, _BLOCK_BYTES // (4 * channels * inputs.shape[0]))
    blocks = []
    for start in range(0, tokens, step):
        end = min(start + step, tokens)
        block, length = inputs[:, start : end + taps - 1].to(dtype), end - start
        total = block[:, :length] * columns[0]
        for w in range(1, taps):
            total = torch.addcmul(total, block[:, w : w + length], columns[w])
        blocks.append(F.silu(total).to(inputs.dtype))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


def inplace_short_convolution(
    x: Tensor, weight: Tensor, *, state: Tensor | None = None, lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same without a backward, a block of tokens at a time in memory that is reused; packed documents are not taken."""
    batch, tokens, channels = x.shape
    past, dtype = weight.shape[-1] - 1, wide_dtype(x, weight)
    before = x.new_zeros(batch, past, channels) if state is None else state.mT.to(x.dtype)
    columns = weight.to(dtype).T.contiguous()
    step = max(1, min(tokens, _BLOCK_BYTES // (4 * channels * batch)))
    inputs = torch.empty(batch, past + step, channels, dtype=dtype)
    sums, out = torch.empty(batch, step, channels, dtype=dtype), torch.empty_like(x)
    inputs[:, :past] = before
    for start in range(0, tokens, step):
        size = min(step, tokens - start)
        inputs[:, past : past + size] = x[:, start : start + size]
        total = torch.mul(inputs[:, :size], columns[0], out=sums[:, :size])
        for w in range(1, past + 1):
            total.addcmul_(inputs[:, w : w + size], columns[w])
        out[:, start : start + size] = F.silu(total, inplace=True)
        inputs[:, :past] = inputs[:, size : size + past].clone()
    return out, _last_inputs(before, x, lengths)


def _last_inputs(before: Tensor, x: Tensor, lengths: Tensor | None) -> Tensor:
    """The last W - 1 inputs of each row [B, C, W-1]: of `before` [B, W-1, C] and then x, up to the row's length."""
    past = before.shape[1]
    if lengths is None:
        recent = x[:, max(0, x.shape[1] - past) :]
        return torch.cat([before, recent], dim=1)[:, recent.shape[1] :].mT
    index = lengths[:, None] + torch.arange(past, device=x.device)
    return torch.cat([before, x], dim=1).gather(1, index[..., None].expand(-1, -1, x.shape[-1])).mT


def _cannot_be_in_place(
    x: Tensor, weight: Tensor, *, state: Tensor | None = None, lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}, not on a CPU"
    if cu_seqlens is not None:
        return "cu_seqlens: it does not keep packed documents apart"
    return "a graph is being compiled" if torch.compiler.is_compiling() else None


def _cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Iterator[tuple[tuple, dict]]:
    for batch, tokens, channels, taps in ((2, 7, 12, 4), (3, 1, 5, 2), (1, 65, 10, 4)):
        x = torch.randn(batch, tokens, channels, generator=generator, dtype=torch.float64).to(device, dtype)
        weight = torch.randn(channels, taps, generator=generator, dtype=torch.float64).to(device, dtype)
        state = torch.randn(batch, channels, taps - 1, generator=generator, dtype=torch.float64).to(device, dtype)
        yield (x, weight), {}
        yield (x, weight), {"state": state}
        if batch == 1:
            bounds = torch.tensor([0, 1, 3, 40, tokens], device=device)
            yield (x, weight), {"cu_seqlens": bounds, "state": state.expand(4, -1, -1).contiguous()}


backends.register("short_convolution", "inplace", inplace_short_convolution, _cannot_be_in_place, differentiable=False)
backends.register("short_convolution", "torch", short_convolution)
backends.register("short_convolution", "direct", direct_short_convolution)
backends.add_cases("short_convolution", direct_short_convolution, _cases)
