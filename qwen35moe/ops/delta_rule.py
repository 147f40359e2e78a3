"""The gated delta rule: a recurrent state that decays by a gate and is corrected rather than accumulated.

Yang et al. 2024, "Gated Delta Networks". Per value head, with keys and queries of unit length:

    S_t = exp(decay_t) S_{t-1} + k_t (x) beta_t (v_t - exp(decay_t) S_{t-1}^T k_t)        S [K, V]
    o_t = S_t^T q_t / sqrt(K)

The function below is that recurrence, token by token; `ops.delta_chunked` computes the same in chunks of tokens. All forms have
one contract:

    query, key [B, T, G, K]   normalised by the rule: x / sqrt(sum x^2 + 1e-6); key head g serves the value heads
                              g H/G ... (g+1) H/G - 1
    value [B, T, H, V]        H a multiple of G
    decay [B, T, H]           log of the share of the state that a token keeps, <= 0
    beta [B, T, H]            learning rate, 0 (write nothing) to 1 (replace what the key recalls)
    state [B, H, K, V]        the recurrent state before the first token; None is zero
    cu_seqlens [documents+1]  B = 1: the bounds of packed documents; `state` then has one row per document
    returns (output [B, T, H, V] in value's dtype, state after the last token [B or documents, H, K, V], float32 at least)
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.backends import operation
from qwen35moe.ops.norm import l2_norm
from qwen35moe.ops.precision import wide_dtype, widen, without_autocast


def decay_and_beta(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gates of the rule from the projections a and b [..., H]: decay = -exp(A_log) softplus(a + dt_bias), beta =
    sigmoid(b), both [..., H].

    A_log, dt_bias [H]. Float32 at least: a 64-token decay summed in bfloat16 is off by 2.5 % (median), in float32 by 2e-7.
    """
    dtype = wide_dtype(a, A_log)
    return -A_log.to(dtype).exp() * F.softplus(a.to(dtype) + dt_bias.to(dtype)), b.to(dtype).sigmoid()


@operation(name="recurrent")
@without_autocast
def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, *, decay: Tensor, beta: Tensor,
    state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence. See the contract above."""
    if cu_seqlens is not None:
        return _by_document(query, key, value, decay, beta, state, cu_seqlens)
    q, k, v, decay, beta = widen(query, key, value, decay, beta)
    repeats = v.shape[2] // k.shape[2]
    q = l2_norm(q).repeat_interleave(repeats, dim=2) * q.shape[-1] ** -0.5
    k = l2_norm(k).repeat_interleave(repeats, dim=2)
    S = initial_state(state, q, v)
    outputs = []
    for t in range(q.shape[1]):
        S = S * decay[:, t].exp()[..., None, None]  # forget
        recalled = torch.einsum("bhk,bhkv->bhv", k[:, t], S)  # the value that the state holds for this key
        write = beta[:, t, :, None] * (v[:, t] - recalled)  # only the correction
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], write)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return (torch.stack(outputs, dim=1) if outputs else v).to(value.dtype), S


def initial_state(state: Tensor | None, q: Tensor, v: Tensor) -> Tensor:
    """`state` [B, H, K, V] in v's dtype; zeros for None."""
    if state is None:
        return v.new_zeros(v.shape[0], v.shape[2], q.shape[-1], v.shape[-1])
    return state.to(v.dtype)


def _by_document(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    outputs, states = [], []
    for document, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        rows = slice(start, end)
        before = None if state is None else state[document : document + 1]
        output, after = gated_delta_rule.definition(
            query[:, rows], key[:, rows], value[:, rows], decay=decay[:, rows], beta=beta[:, rows], state=before
        )
        outputs.append(output)
        states.append(after)
    if not states:  # no document
        return value, initial_state(state, *widen(query, value))[:0]
    return torch.cat(outputs, dim=1), torch.cat(states)
