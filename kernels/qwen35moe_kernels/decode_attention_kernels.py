"""The Triton kernels of attention of one query token per row; `decode_attention.py` launches them."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright reads the kernels as Python: constexprs are not numbers there.
from __future__ import annotations

import triton
import triton.language as tl

from qwen35moe_kernels import runtime

INTERPRETED = tl.constexpr(runtime.interpreted())  # the interpreter multiplies the bit patterns of bfloat16


@triton.jit
def _dot(a, b):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision="ieee")


@triton.jit(do_not_specialize=["P"])
def part_kernel(
    query, key, value, starts, out, sums, scale, P, query_row, query_head, key_row, key_token, key_head, value_row, value_token,
    value_head, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BN: tl.constexpr, CHUNK: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """One row, one key head with its R query heads, and CHUNK positions: the sum of exp2(score - m) value, its m (the largest
    score of a head) and the sum of exp2(score - m); ONE: a chunk spans all positions, and out is the result.

    Positions behind starts[row] are not read, so that what they hold does not matter. Scores are in powers of two: scale
    includes log2(e).
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    end = tl.minimum(tl.minimum(tl.load(starts + row) + 1, P), (part + 1) * CHUNK).to(tl.int32)
    r = tl.arange(0, BR)
    k = tl.arange(0, BK)
    v = tl.arange(0, BV)
    head = group * R + r
    q = tl.load(query + row * query_row + head[:, None] * query_head + k[None, :], mask=(r < R)[:, None] & (k < K)[None, :],
                other=0.0)  # fmt: skip
    largest = tl.full([BR], -float("inf"), tl.float32)
    total = tl.zeros([BR], tl.float32)
    acc = tl.zeros([BR, BV], tl.float32)
    for first in range(part * CHUNK, end, BN):
        position = first + tl.arange(0, BN)
        inside = position < end
        at = position.to(tl.int64)
        keys = tl.load(key + row * key_row + at[None, :] * key_token + group * key_head + k[:, None],
                       mask=inside[None, :] & (k < K)[:, None], other=0.0)  # fmt: skip
        scores = _dot(q, keys) * scale
        scores = tl.where(inside[None, :], scores, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        factor = tl.exp2(largest - larger)
        weights = tl.exp2(scores - larger[:, None])
        total = total * factor + tl.sum(weights, axis=1)
        values = tl.load(value + row * value_row + at[:, None] * value_token + group * value_head + v[None, :],
                         mask=inside[:, None] & (v < V)[None, :], other=0.0)  # fmt: skip
        acc = acc * factor[:, None] + _dot(weights.to(values.dtype), values)
        largest = larger
    if ONE:
        acc = acc / total[:, None]
    parts = tl.num_programs(2)
    index = ((row * tl.num_programs(1) + group) * R + r) * parts + part  # [B, H, parts]
    tl.store(out + index[:, None] * V + v[None, :], acc.to(out.dtype.element_ty), mask=(r < R)[:, None] & (v < V)[None, :])
    if not ONE:
        tl.store(sums + index * 2, largest, mask=r < R)
        tl.store(sums + index * 2 + 1, total, mask=r < R)


@triton.jit(do_not_specialize=["PARTS"])
def join_kernel(parts_of, sums, out, PARTS, V: tl.constexpr, BV: tl.constexpr, BP: tl.constexpr):
    """One row and head: the parts with a common largest score. A part without positions has -inf and 0."""
    index = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BP)
    v = tl.arange(0, BV)
    at = index * PARTS + part
    largest = tl.load(sums + at * 2, mask=part < PARTS, other=-float("inf"))
    total = tl.load(sums + at * 2 + 1, mask=part < PARTS, other=0.0)
    factor = tl.exp2(largest - tl.max(largest, axis=0))
    values = tl.load(parts_of + at[:, None] * V + v[None, :], mask=(part < PARTS)[:, None] & (v < V)[None, :], other=0.0)
    result = tl.sum(values * factor[:, None], axis=0) / tl.sum(total * factor, axis=0)
    tl.store(out + index * V + v, result.to(out.dtype.element_ty), mask=v < V)
