"""Calls of the kernels' launch code on fake tensors, at the sizes of Qwen3.5-35B-A3B, for launches.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

G, H, K, V, W = 16, 32, 128, 128, 4
C = 2 * G * K + H * V
HIDDEN, HEADS, GROUPS, HEAD, ROTATED = 2048, 16, 2, 256, 64
EXPERTS, WIDTH, TOP_K = 256, 512, 8


def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def delta_rule(
    tokens: int = 130, rows: int = 2, packed: bool = False, back: bool = True, width: int = K, dtype: str = "bfloat16"
) -> None:
    from qwen35moe_kernels.delta_rule import delta_rule as forward
    from qwen35moe_kernels.delta_rule import delta_rule_back

    kind, rows = getattr(torch, dtype), 1 if packed else rows
    parts = new(rows, tokens, (2 * G + H) * width, dtype=kind).split([G * width, G * width, H * width], -1)
    query, key, value = (part.unflatten(-1, (heads, width)) for part, heads in zip(parts, (G, G, H), strict=True))
    bounds = new(4, dtype=torch.int64) if packed else None
    state = new(3 if packed else rows, H, width, width, dtype=torch.float32)
    decay, beta = new(rows, tokens, H, dtype=torch.float32), new(rows, tokens, H, dtype=kind)
    output, final, *saved = forward._init_fn(query, key, value, decay, beta, state, bounds)
    if back:
        d_output, d_final = new(*output.shape, dtype=kind), torch.empty_like(final)
        delta_rule_back._init_fn(d_output, d_final, query, key, value, beta, bounds, *saved)


def experts(tokens: int, keep: bool = True, dtype: str = "bfloat16") -> None:
    from qwen35moe_kernels import experts as module

    kind = getattr(torch, dtype)
    hidden, gate_up, down = (
        new(*shape, dtype=kind) for shape in ((tokens, HIDDEN), (EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH))
    )
    indices, weights = new(tokens, TOP_K, dtype=torch.int64), new(tokens, TOP_K, dtype=kind)
    _, pre, order = module._forward(hidden, gate_up, down, indices, weights, keep)
    if keep:
        dy = torch.empty_like(hidden)
        module._backward(dy, hidden, gate_up, down, indices, weights, pre, order, [True] * 3)


def convolution(tokens: int = 70, rows: int = 2) -> None:
    from qwen35moe_kernels import convolution as module

    weight, integers = new(C, W), torch.int64
    for batch, state, lengths, bounds in (
        (rows, rows, None, None), (rows, rows, new(rows, dtype=integers), None), (1, 3, None, new(4, dtype=integers))
    ):  # fmt: skip
        x, before = new(batch, tokens, C), new(state, C, W - 1)
        module._forward(x, weight, before, lengths, bounds)
        module._backward(torch.empty_like(x), torch.empty_like(before), x, weight, before, lengths, bounds)


def decoder(tokens: int = 70, rows: int = 2) -> None:
    """Norms, rotation and router."""
    from qwen35moe_kernels import gated_norm, norm, rotary, router

    for shape in ((rows, tokens, HIDDEN), (rows, tokens, HEADS, HEAD)):
        x, weight = new(*shape), new(shape[-1])
        norm.rms_norm(x, weight, eps=1e-6)
        norm._backward(x, x, weight, 1e-6)
    x, weight = new(rows, tokens, H, V), new(V)
    gated_norm.gated_rms_norm(x, x, weight, eps=1e-6)
    gated_norm._backward(x, x, x, weight, 1e-6)
    router._choose(new(rows * tokens, EXPERTS), TOP_K)
    angles = new(rows, tokens, ROTATED // 2, dtype=torch.float32)
    rotary.rotary(new(rows, tokens, HEADS, HEAD), new(rows, tokens, GROUPS, HEAD), angles, angles)


def step(rows: int) -> None:
    from qwen35moe_kernels.step import delta_net_step

    names: dict[str, Any] = {"conv_state": (rows, C, W - 1), "conv_weight": (C, W), "A_log": (H,), "dt_bias": (H,)}
    states = {name: new(*shape) for name, shape in names.items()}
    states["recurrent_state"] = new(rows, H, K, V, dtype=torch.float32)
    gates = new(rows, H, V), new(rows, H), new(rows, H)
    delta_net_step(new(rows, C), *gates, **states, norm_weight=new(V), groups=G, eps=1e-6)


def fused(tokens: int = 1) -> None:
    """The launches of a step that replace several operations; more than 4 tokens take torch's products."""
    from qwen35moe_kernels import linear, norm, rotary, shared_expert, sigmoid_gate

    x, angles = new(1, tokens, HIDDEN), new(1, tokens, ROTATED // 2, dtype=torch.float32)
    query, key = new(1, tokens, HEADS, 2 * HEAD).split(HEAD, -1)[0], new(1, tokens, GROUPS, HEAD)
    norm.add_rms_norm(x, x, new(HIDDEN), eps=1e-6)
    if tokens <= 4:
        linear.projections(x, new(C, HIDDEN), new(H * V, HIDDEN), new(H, HIDDEN), new(H, HIDDEN))
        linear.projections(x, new(2 * HEADS * HEAD, HIDDEN), *(new(GROUPS * HEAD, HIDDEN) for _ in range(2)))
    linear.swiglu(x, new(WIDTH, HIDDEN), new(WIDTH, HIDDEN))
    rotary.norm_rotary(query, key, angles, angles, new(HEAD), new(HEAD), eps=1e-6)
    sigmoid_gate.sigmoid_gate(query, query)
    shared_expert.add_shared_expert(x, x, x, x, new(1, HIDDEN))


def attention(positions: int, rows: int = 2) -> None:
    """One token per row."""
    from qwen35moe_kernels.decode_attention import attention as decode

    key, starts = new(rows, positions, GROUPS, HEAD), new(rows, dtype=torch.int64)
    decode(new(rows, 1, HEADS, HEAD), key, key, scale=HEAD**-0.5, starts=starts)


CASES: dict[str, Callable[..., None]] = {
    "delta_rule": delta_rule, "experts": experts, "convolution": convolution, "decoder": decoder, "fused": fused, "step": step,
    "attention": attention,
}  # fmt: skip
