"""What the kernels of the gated delta rule share: tiles of memory, spans of chunks, products, and decays.

Letters as everywhere: T tokens, G key heads, H value heads, K key width, V value width, C = 64 tokens in a chunk. Tokens
are counted through the whole batch, so that row b of a batch begins at b T and a packed document at its own offset.
"""

# pyright: reportInvalidTypeForm=false, reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from qwen35moe_kernels import runtime

FLOOR = tl.constexpr(-30.0)  # e^-30 = 1e-13: below it nothing of a memory is left that a float32 beside it could show
STEP = tl.constexpr(64.0)  # gates are split at multiples of 1/64
HARDEST = tl.constexpr(-4096.0)  # 64 gates of this size are the largest sum of 1/64s that float32 holds exactly


def _mend_the_interpreter() -> None:
    """Triton 3.6's interpreter turns an array of one number into the end of a `range` by int(), which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = mended


if runtime.interpreted():
    _mend_the_interpreter()


@triton.jit
def product(a, b, ROUND: tl.constexpr, WIDEN: tl.constexpr):
    """a b of operands rounded to ROUND, the dtype of the inputs, summed in float32. WIDEN them afterwards in the
    interpreter, which would multiply the bit patterns of bfloat16."""
    a, b = a.to(ROUND), b.to(ROUND)
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def load_rows(base, begin, end, stride, first, width, N: tl.constexpr, W: tl.constexpr):
    """[N, W]: rows begin ... begin + N - 1 and columns first ... first + W - 1; zero from row `end`, column `width` on."""
    rows = begin + tl.arange(0, N)
    columns = first + tl.arange(0, W)
    inside = (rows < end)[:, None] & (columns < width)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], inside, other=0.0)


@triton.jit
def store_rows(base, tile, begin, end, stride, first, width, N: tl.constexpr, W: tl.constexpr):
    """Stores [N, W] where `load_rows` would load it."""
    rows = begin + tl.arange(0, N)
    columns = first + tl.arange(0, W)
    inside = (rows < end)[:, None] & (columns < width)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], tile.to(base.dtype.element_ty), inside)


@triton.jit
def load_column(base, begin, end, stride, N: tl.constexpr):
    """[N] float32: one number per token, zero from token `end` on."""
    rows = begin + tl.arange(0, N)
    return tl.load(base + rows * stride, rows < end, other=0.0).to(tl.float32)


@triton.jit
def store_column(base, column, begin, end, stride, N: tl.constexpr):
    rows = begin + tl.arange(0, N)
    tl.store(base + rows * stride, column.to(base.dtype.element_ty), rows < end)


@triton.jit
def load_inverse(inverse, h, begin, end, H: tl.constexpr, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(I + A)^-1 [C, C] of one chunk and head; what lies above the diagonal was never written."""
    one, other = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    i, j = (other, one) if TRANSPOSED else (one, other)
    return tl.load(inverse + ((begin + i) * H + h) * C + j, (begin + i < end) & (j <= i), other=0.0)


@triton.jit
def span_of_chunk(spans, chunk, tokens, PACKED: tl.constexpr, C: tl.constexpr):
    """(begin, end) of a chunk. spans [chunks, 2] says where the chunks of packed documents lie; spare ones are empty."""
    if PACKED:
        begin = tl.load(spans + 2 * chunk)
        end = tl.load(spans + 2 * chunk + 1)
    else:
        each = tl.cdiv(tokens, C)
        row = chunk // each
        begin = row * tokens + chunk % each * C
        end = tl.minimum(begin + C, (row + 1) * tokens)
    return begin, end


@triton.jit
def span_of_sequence(bounds, first_chunks, n, tokens, PACKED: tl.constexpr, C: tl.constexpr):
    """(begin, end, number of the first chunk) of row or document n."""
    if PACKED:
        begin = tl.load(bounds + n)
        end = tl.load(bounds + n + 1)
        chunk = tl.load(first_chunks + n)
    else:
        begin = n * tokens
        end = begin + tokens
        chunk = n * tl.cdiv(tokens, C)
    return begin, end, chunk


@triton.jit
def forgetting(logs):
    """exp(logs), exactly zero below e^-30."""
    return tl.where(logs > FLOOR, tl.exp(logs), 0.0)


@triton.jit
def split(decay):
    """decay = coarse + fine: multiples of 1/64, which sums and differences of a chunk keep exactly, and less than 1/128.

    With it D_ij = exp((coarse_i - coarse_j) + (fine_i - fine_j)) of running sums is right to 6e-8 behind any gate, where
    the difference of plain running sums has lost a gate of -1e-4 behind one of -80. From -4096 on a gate is one of -4096:
    either leaves nothing.
    """
    decay = tl.maximum(decay, HARDEST)
    coarse = tl.floor(decay * STEP + 0.5) / STEP
    return coarse, decay - coarse


@triton.jit
def load_sums(sums, h, begin, end, total, H: tl.constexpr, C: tl.constexpr):
    """The running sums of a chunk's decays in their two parts [C], and what they are after its last token."""
    last = (tl.minimum(begin + C, end) - 1) * H + h
    coarse = load_column(sums + h, begin, end, H, C)
    fine = load_column(sums + total * H + h, begin, end, H, C)
    return coarse, fine, tl.load(sums + last), tl.load(sums + total * H + last)


@triton.jit
def decays_between(coarse, fine, begin, end, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    """D [C, C]: what token i still has of token j <= i, the constant 1 on the diagonal; zero above it and from `end` on.

    Masked before the exponential: above the diagonal it would overflow.
    """
    one, other = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    logs = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    if TRANSPOSED:
        logs, seen = -logs, (other >= one) & (begin + other < end)
    else:
        seen = (one >= other) & (begin + one < end)
    return forgetting(tl.where(seen, logs, float("-inf")))
