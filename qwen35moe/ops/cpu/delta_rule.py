"""The gated delta rule as matrix products of chunks of tokens: the implementations. Contract in `ops.delta_rule`.

The forward is in delta_chunks.py, the backward in delta_gradient.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen35moe.ops.cpu.decode_step import one_token
from qwen35moe.ops.cpu.delta_chunks import chunked_forward, plan
from qwen35moe.ops.cpu.delta_gradient import chunked_operator
from qwen35moe.ops.delta_rule import gated_delta_rule, initial_state
from qwen35moe.ops.precision import widen, without_autocast

CHUNK = 32  # M: smaller chunks need fewer products per token, larger ones fewer calls; 32 is the fastest on CPUs


@gated_delta_rule.implementation("chunked_cpu", compiles=False, differentiable=False, transforms=())
def chunked_gated_delta_rule_cpu(
    query: Tensor, key: Tensor, value: Tensor, *, decay: Tensor, beta: Tensor,
    state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Chunks without a backward; one token by the recurrence."""
    if query.shape[1] == 1 and cu_seqlens is None:
        return _one_token(query, key, value, decay, beta, state)
    rows = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return chunked_forward(plan(key, value, cu_seqlens, CHUNK), query, key, value, decay, beta, state, rows)


@without_autocast
def _one_token(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, k, v, decay, beta = widen(query, key, value, decay, beta)
    state = initial_state(state, q, v)
    output, state = one_token(torch.cat([q, k], dim=1), v[:, 0], decay[:, 0].exp(), beta[:, 0], state)
    return output[:, None].to(value.dtype), state


def chunked_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, *, decay: Tensor, beta: Tensor,
    state: Tensor | None = None, cu_seqlens: Tensor | None = None, chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Chunks of chunk_size = M tokens, 8, 16, 32, ...; differentiable once."""
    return chunked_operator(query, key, value, decay, beta, state, cu_seqlens, chunk_size)


@gated_delta_rule.implementation("torch", transforms=(), double_backward=False)
def gated_delta_rule_torch(
    query: Tensor, key: Tensor, value: Tensor, *, decay: Tensor, beta: Tensor,
    state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence for one token, chunks for more."""
    form = gated_delta_rule.definition if query.shape[1] == 1 else chunked_gated_delta_rule
    return form(query, key, value, decay=decay, beta=beta, state=state, cu_seqlens=cu_seqlens)
