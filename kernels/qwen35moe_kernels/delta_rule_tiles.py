"""Shared by the kernels of the gated delta rule: loads and stores of tiles, spans of chunks, products, and decays.

T tokens, G key heads, H value heads, K key width, V value width, M = 64 tokens in a chunk. Tokens are numbered through the
whole batch: row b of a batch starts at b T, a packed document at its own offset.
"""

# pyright: reportInvalidTypeForm=false, reportArgumentType=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qwen35moe_kernels import runtime

FLOOR = tl.constexpr(-30.0)  # e^-30 = 1e-13: a smaller decay changes no digit of a float32 sum
STEP = tl.constexpr(64.0)  # log decays are split at multiples of 1/64
PRECISION = tl.constexpr("ieee" if torch.version.hip else "tf32x3")  # of float32 products; AMD's compiler has no tf32x3
LOWEST = tl.constexpr(-4096.0)  # 64 of it are the largest sum of multiples of 1/64 that float32 holds exactly


def _patch_interpreter() -> None:
    """Triton 3.6's interpreter applies int() to an array of one element at the end of a `range`, which NumPy 2.4 rejects."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if runtime.interpreted():
    _patch_interpreter()


@triton.jit
def product(a, b, ROUND: tl.constexpr, WIDEN: tl.constexpr):
    """a b with operands rounded to ROUND, the dtype of the inputs, and float32 sums. WIDEN: convert the rounded operands to
    float32, for the interpreter, which would multiply the bit patterns of bfloat16."""
    a, b = a.to(ROUND), b.to(ROUND)
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load_rows(base, begin, end, stride, first, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] from row `begin` and column `first` on; zero from row `end` and column `width` on."""
    rows = begin + tl.arange(0, ROWS)
    columns = first + tl.arange(0, COLUMNS)
    inside = (rows < end)[:, None] & (columns < width)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], inside, other=0.0)


@triton.jit
def store_rows(base, tile, begin, end, stride, first, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Stores the tile that `load_rows` loads."""
    rows = begin + tl.arange(0, ROWS)
    columns = first + tl.arange(0, COLUMNS)
    inside = (rows < end)[:, None] & (columns < width)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], tile.to(base.dtype.element_ty), inside)


@triton.jit
def load_column(base, begin, end, stride, ROWS: tl.constexpr):
    """[ROWS] float32: one value per token, zero from token `end` on."""
    rows = begin + tl.arange(0, ROWS)
    return tl.load(base + rows * stride, rows < end, other=0.0).to(tl.float32)


@triton.jit
def store_column(base, column, begin, end, stride, ROWS: tl.constexpr):
    rows = begin + tl.arange(0, ROWS)
    tl.store(base + rows * stride, column.to(base.dtype.element_ty), rows < end)


@triton.jit
def load_inverse(inverse, h, begin, end, H: tl.constexpr, M: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(I + a)^-1 [M, M] of one chunk and head, with the zeros above its diagonal: a mask of rows alone leaves loads wide."""
    one, other = tl.arange(0, M)[:, None], tl.arange(0, M)[None, :]
    i, j = (other, one) if TRANSPOSED else (one, other)
    return tl.load(inverse + ((begin + i) * H + h) * M + j, begin + i < end, other=0.0)


@triton.jit
def span_of_chunk(spans, chunk, tokens, PACKED: tl.constexpr, M: tl.constexpr):
    """(begin, end) of a chunk. spans [chunks, 2]: those of packed documents; unused ones are empty."""
    if PACKED:
        begin = tl.load(spans + 2 * chunk)
        end = tl.load(spans + 2 * chunk + 1)
    else:
        per_row = tl.cdiv(tokens, M)
        row = chunk // per_row
        begin = row * tokens + chunk % per_row * M
        end = tl.minimum(begin + M, (row + 1) * tokens)
    return begin, end


@triton.jit
def span_of_sequence(bounds, first_chunks, n, tokens, PACKED: tl.constexpr, M: tl.constexpr):
    """(begin, end, index of the first chunk) of row or document n."""
    if PACKED:
        begin = tl.load(bounds + n)
        end = tl.load(bounds + n + 1)
        chunk = tl.load(first_chunks + n)
    else:
        begin = n * tokens
        end = begin + tokens
        chunk = n * tl.cdiv(tokens, M)
    return begin, end, chunk


@triton.jit
def decay_factor(logs):
    """exp(logs), exactly zero below e^-30."""
    return tl.where(logs > FLOOR, tl.exp(logs), 0.0)


@triton.jit
def split(decay):
    """decay = coarse + fine: a multiple of 1/64, whose sums and differences in a chunk are exact, and at most 1/128.

    With running sums of both, d_ij = exp((coarse_i - coarse_j) + (fine_i - fine_j)) is right to 6e-8 behind any decay. A
    difference of plain running sums would lose a log decay of -1e-4 behind one of -80. Log decays below -4096 are taken as
    -4096; exp of either is zero.
    """
    decay = tl.maximum(decay, LOWEST)
    coarse = tl.floor(decay * STEP + 0.5) / STEP
    return coarse, decay - coarse


@triton.jit
def load_sums(sums, h, begin, end, total, H: tl.constexpr, M: tl.constexpr):
    """The running sums of a chunk's log decays, coarse and fine [M], and both at the last token."""
    last = (tl.minimum(begin + M, end) - 1) * H + h
    coarse = load_column(sums + h, begin, end, H, M)
    fine = load_column(sums + total * H + h, begin, end, H, M)
    return coarse, fine, tl.load(sums + last), tl.load(sums + total * H + last)


@triton.jit
def decays_between(coarse, fine, begin, end, M: tl.constexpr, TRANSPOSED: tl.constexpr):
    """d [M, M], the decay from token j to token i >= j: 1 on the diagonal, zero above it and from token `end` on.

    The mask is applied before the exponential, which would overflow above the diagonal.
    """
    one, other = tl.arange(0, M)[:, None], tl.arange(0, M)[None, :]
    logs = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    if TRANSPOSED:
        logs, mask = -logs, (other >= one) & (begin + other < end)
    else:
        mask = (one >= other) & (begin + one < end)
    return decay_factor(tl.where(mask, logs, float("-inf")))
