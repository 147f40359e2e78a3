"""The Triton kernel of the router's choice; `router.py` launches it."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N"])
def choose_kernel(logits, indices, weights, N, E, TOP_K: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr):
    """The TOP_K largest of the E logits of BN tokens, largest first and of equal ones the first, and their softmax."""
    token = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    expert = tl.arange(0, BE)
    mask = (token < N)[:, None] & (expert < E)[None, :]
    z = tl.load(logits + token[:, None] * E + expert[None, :], mask=mask, other=float("-inf")).to(tl.float32)
    largest = tl.max(z, axis=1)
    p = tl.where(mask, tl.exp(z - largest[:, None]), 0.0)
    invalid = tl.sum(p, axis=1) * 0.0  # NaN where a logit is NaN or +inf, or all are -inf; else zero
    left = tl.where(mask & (p == p), p, tl.where(mask, 0.0, -1.0))
    place = tl.arange(0, BK)
    chosen = tl.zeros([BN, BK], dtype=tl.float32)
    at = tl.zeros([BN, BK], dtype=tl.int32)
    for j in tl.static_range(TOP_K):
        best = tl.argmax(left, axis=1, tie_break_left=True)
        chosen = tl.where((place == j)[None, :], tl.max(left, axis=1)[:, None], chosen)
        at = tl.where((place == j)[None, :], best[:, None], at)
        left = tl.where(expert[None, :] == best[:, None], -1.0, left)
    w = chosen / tl.sum(chosen, axis=1)[:, None] + invalid[:, None]
    out = token[:, None] * TOP_K + place[None, :]
    valid = (token < N)[:, None] & (place < TOP_K)[None, :]
    tl.store(indices + out, at.to(tl.int64), mask=valid)
    tl.store(weights + out, w.to(weights.dtype.element_ty), mask=valid)
