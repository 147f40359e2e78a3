"""Breakdown of a forward: the steps of the sorted form one after another, each timed by itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe import ops
from qwen35moe.ops.cpu.products import product

router = ops.router.definition

STEPS: tuple[str, ...] = ("route", "sort", "gather", "up", "activation", "down", "combine")


@torch.no_grad()
def breakdown(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, rounds: int = 3
) -> dict[str, float]:
    """Seconds of each step, the minimum of some rounds. The steps do not overlap or share the cache, and "route" (the
    router's product, softmax and top-k) is not part of the experts: the sum is not the time of any form."""
    gate = torch.randn(gate_up.shape[0], hidden.shape[1], device=hidden.device).to(hidden.dtype)
    best = dict.fromkeys(STEPS, float("inf"))
    for _ in range(rounds + 1):
        for name, seconds in _once(hidden, gate_up, down, indices, weights, gate).items():
            best[name] = min(best[name], seconds)
    return best


def _once(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, gate: Tensor
) -> dict[str, float]:
    taken: dict[str, float] = {}
    top_k, width, inner = indices.shape[1], hidden.shape[1], down.shape[-1]

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if hidden.is_cuda:
            torch.cuda.synchronize()
        taken[name] = time.perf_counter() - start

    with timed("route"):
        router(hidden, gate, top_k=top_k)
    with timed("sort"):
        flat = indices.reshape(-1)
        counts = torch.bincount(flat, minlength=gate_up.shape[0]).tolist()
        order = flat.argsort(stable=True)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device)).view_as(indices)
    with timed("gather"):
        rows = hidden.index_select(0, order // top_k)
    pre, out = rows.new_empty(len(rows), 2 * inner), rows.new_empty(len(rows), width)
    for buffer in (pre, out):
        buffer.zero_()  # maps its pages before anything is timed
    parts = [(expert, x, p) for expert, (x, p) in enumerate(zip(rows.split(counts), pre.split(counts), strict=True)) if len(x)]
    with timed("up"):
        for expert, x, p in parts:
            product(x, gate_up[expert], p)
    with timed("activation"):
        act = F.silu(pre[:, :inner]) * pre[:, inner:]
    with timed("down"):
        for expert, (a, y) in enumerate(zip(act.split(counts), out.split(counts), strict=True)):
            if len(a):
                product(a, down[expert], y)
    with timed("combine"):
        F.embedding_bag(places, out, mode="sum", per_sample_weights=weights.to(out.dtype))
    return taken
