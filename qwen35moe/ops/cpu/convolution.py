"""The short causal convolution of `ops.convolution` for all tokens at once, and for a block of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen35moe.ops.convolution import short_convolution
from qwen35moe.ops.precision import wide_dtype

_BLOCK_BYTES = 2 << 20  # the float32 sums of one block of tokens stay in cache


@short_convolution.implementation("torch")
def short_convolution_torch(
    x: Tensor, weight: Tensor, *, state: Tensor | None = None, lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Shifted products of all rows and documents at once. The output at padding is undefined."""
    taps, channels = weight.shape[-1], x.shape[-1]
    past = taps - 1
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    before = x.new_zeros(rows, past, channels) if state is None else state.mT.to(x.dtype)
    if cu_seqlens is not None:
        return _packed(x, weight, before, cu_seqlens, _shifted_sum)
    return _shifted_sum(torch.cat([before, x], dim=1), weight), _last_inputs(before, x, lengths)


def _packed(
    x: Tensor, weight: Tensor, before: Tensor, cu_seqlens: Tensor, convolve: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Insert each document's W - 1 inputs `before` [documents, W-1, C] in front of it, then convolve all documents as one
    row."""
    past, tokens = weight.shape[-1] - 1, x.shape[1]
    bounds = cu_seqlens.to(x.device)
    documents = bounds.shape[0] - 1
    order = torch.arange(documents, device=x.device)
    document = torch.repeat_interleave(order, bounds.diff(), output_size=tokens)
    position = torch.arange(tokens, device=x.device) + past * (document + 1)
    tap = torch.arange(past, device=x.device)
    front = (bounds[:-1] + past * order)[:, None] + tap
    inputs = x.new_zeros(1, tokens + past * documents, x.shape[-1])
    inputs = inputs.index_copy(1, position, x).index_copy(1, front.flatten(), before.reshape(1, -1, x.shape[-1]))
    end = (bounds[1:] + past * order)[:, None] + tap  # the last W - 1 inputs of each document, with `before`
    last = inputs[0, end]
    return convolve(inputs, weight).index_select(1, position - past), last.mT


def _shifted_sum(inputs: Tensor, weight: Tensor) -> Tensor:
    """silu(sum_w weight[:, w] * inputs[:, t + w]) for t = 0 ... T - 1 of inputs [B, T + W - 1, C]."""
    taps = weight.shape[-1]
    tokens, dtype = inputs.shape[1] - taps + 1, wide_dtype(inputs, weight)
    wide, columns = inputs.to(dtype), weight.to(dtype).T.contiguous()
    total = wide[:, :tokens] * columns[0]
    for w in range(1, taps):
        total = torch.addcmul(total, wide[:, w : w + tokens], columns[w])
    return F.silu(total).to(inputs.dtype)


@short_convolution.implementation(
    "cpu", before="torch", device="cpu", compiles=False, transforms=(), double_backward=False
)
def short_convolution_cpu(
    x: Tensor, weight: Tensor, *, state: Tensor | None = None, lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A block of tokens at a time in memory that is reused. Differentiable once; the backward keeps x, weight and state
    alone."""
    past, channels = weight.shape[-1] - 1, x.shape[-1]
    rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    before = x.new_zeros(rows, past, channels) if state is None else state.mT.to(x.dtype)
    if cu_seqlens is not None:
        return _packed(x, weight, before, cu_seqlens, _blocked)
    return _Convolution.apply(x, weight, before), _last_inputs(before, x, lengths)  # pyright: ignore[reportReturnType]


def _blocked(inputs: Tensor, weight: Tensor) -> Tensor:
    past = weight.shape[-1] - 1
    return _Convolution.apply(inputs[:, past:], weight, inputs[:, :past])  # pyright: ignore[reportReturnType]


class _Convolution(torch.autograd.Function):
    """y = silu(s), s_t = sum_w weight[:, w] x_{t - W + 1 + w}; x [B, T, C], the W - 1 inputs before it [B, W-1, C].

    Backward, with s computed again: ds = dy silu'(s); dx_t = sum_w weight[:, w] ds_{t + W - 1 - w};
    dweight[:, w] = sum_t ds_t x_{t - W + 1 + w}.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, before: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, before)
        ctx.set_materialize_grads(False)
        work, out = _Sums(x, weight), torch.empty_like(x, memory_format=torch.contiguous_format)
        for start, end in work.blocks():
            if out.dtype == work.columns.dtype:
                F.silu(work.sums(x, before, start, end, out[:, start:end])[0], inplace=True)
            else:
                out[:, start:end] = F.silu(work.sums(x, before, start, end)[0], inplace=True)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return None, None, None
        x, weight, before = ctx.saved_tensors
        work, past = _Sums(x, weight), before.shape[1]
        d_x, d_columns = torch.empty_like(x), torch.zeros_like(work.columns)
        d_inputs = torch.zeros_like(work.inputs)  # of one block and the W - 1 inputs before it
        for start, end in reversed(list(work.blocks())):
            size = end - start
            d_y = grads[0][:, start:end].to(work.columns.dtype)
            total, inputs = work.sums(x, before, start, end)
            d_sums = torch.ops.aten.silu_backward(d_y, total)
            d_inputs[:, size : size + past] = d_inputs[:, :past].clone()  # gradients from the next block
            d_inputs[:, :size] = 0
            for w in range(past + 1):
                d_inputs[:, w : w + size].addcmul_(d_sums, work.columns[w])
                d_columns[w] += torch.mul(d_sums, inputs[:, w : w + size], out=total).sum((0, 1))
            d_x[:, start:end] = d_inputs[:, past : past + size]
        return d_x, d_columns.T.to(weight.dtype), d_inputs[:, :past].to(before.dtype)


class _Sums:
    """The sums s_t of a block of tokens at a time, and the inputs [B, W - 1 + size, C] of the block."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        batch, self.tokens, channels = x.shape
        dtype = wide_dtype(x, weight)
        self.past, self.step = weight.shape[-1] - 1, max(1, min(x.shape[1], _BLOCK_BYTES // (4 * channels * batch)))
        self.columns = weight.to(dtype).T.contiguous()
        self.inputs = x.new_empty(batch, self.past + self.step, channels, dtype=dtype)
        self.total = x.new_empty(batch, self.step, channels, dtype=dtype)

    def blocks(self) -> Iterator[tuple[int, int]]:
        return ((start, min(start + self.step, self.tokens)) for start in range(0, self.tokens, self.step))

    def sums(
        self, x: Tensor, before: Tensor, start: int, end: int, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """s_t for t = start ... end - 1, in `out` or else in memory of this object, and the inputs: a view of x where x has
        them all in the dtype of the sums."""
        size = end - start
        if start >= self.past and x.dtype == self.columns.dtype:
            inputs = x[:, start - self.past : end]
        else:
            inputs, from_x = self.inputs[:, : self.past + size], min(start, self.past)  # from x, of the W - 1 before the block
            inputs[:, : self.past - from_x] = before[:, start:]
            inputs[:, self.past - from_x :] = x[:, start - from_x : end]
        total = torch.mul(inputs[:, :size], self.columns[0], out=self.total[:, :size] if out is None else out)
        for w in range(1, self.past + 1):
            total.addcmul_(inputs[:, w : w + size], self.columns[w])
        return total, inputs


def _last_inputs(before: Tensor, x: Tensor, lengths: Tensor | None) -> Tensor:
    """The last W - 1 inputs of each row [B, C, W-1]: of `before` [B, W-1, C] followed by x up to the row's length."""
    past = before.shape[1]
    if lengths is None:
        recent = x[:, max(0, x.shape[1] - past) :]
        return torch.cat([before, recent], dim=1)[:, recent.shape[1] :].mT
    index = lengths[:, None] + torch.arange(past, device=x.device)
    return torch.cat([before, x], dim=1).gather(1, index[..., None].expand(-1, -1, x.shape[-1])).mT
