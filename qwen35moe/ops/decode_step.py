"""One cached token of a Gated DeltaNet layer between its projections: convolution, gates, rule and gated norm.

    q_t, k_t, v_t = silu(sum_w W_conv[:, w] x_{t - W + 1 + w})
    decay_t = -exp(A_log) softplus(a_t + dt_bias);  beta_t = sigmoid(b_t)
    S_t = exp(decay_t) S_{t-1} + k_t (x) beta_t (v_t - exp(decay_t) S_{t-1}^T k_t)      q_t, k_t of unit length
    y_t = gated_rms_norm(S_t^T q_t / sqrt(K), gate_t)

The definition composes the definitions of the other operations. The layer composes the operations themselves, unless a
fused implementation supports the call: a Triton kernel, or the plain PyTorch form of `ops.cpu.decode_step`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen35moe.backends import operation
from qwen35moe.ops.convolution import short_convolution
from qwen35moe.ops.delta_rule import decay_and_beta, gated_delta_rule
from qwen35moe.ops.norm import gated_rms_norm


@operation(composes=("short_convolution", "gated_delta_rule", "gated_rms_norm"))
def delta_net_step(
    qkv: Tensor, gate: Tensor, a: Tensor, b: Tensor, *, conv_state: Tensor, recurrent_state: Tensor, conv_weight: Tensor,
    A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor, groups: int, eps: float, active: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The normed output [B, H, V] in qkv's dtype, and conv_state and recurrent_state after the token.

    qkv [B, C], gate [B, H, V], a and b [B, H], conv_state [B, C, W-1], recurrent_state [B, H, K, V] float32 at least,
    conv_weight [C, W], A_log and dt_bias [H], norm_weight [V]. groups: the number of key heads G.
    active [B] bool: the rows of recurrent_state where it is True are overwritten in place, and recurrent_state is returned.
    """
    H, K, V = recurrent_state.shape[1:]
    state = recurrent_state
    mixed, conv_state = short_convolution.definition(qkv[:, None], conv_weight, state=conv_state)
    query, key, value = mixed.split([groups * K, groups * K, H * V], dim=-1)
    decay, beta = decay_and_beta(a[:, None], b[:, None], A_log, dt_bias)
    core, recurrent_state = gated_delta_rule.definition(
        query.unflatten(-1, (groups, K)), key.unflatten(-1, (groups, K)), value.unflatten(-1, (H, V)),
        decay=decay, beta=beta, state=recurrent_state,
    )
    if active is not None:
        recurrent_state = written(state, recurrent_state, active)
    return gated_rms_norm.definition(core[:, 0], gate, norm_weight, eps=eps), conv_state, recurrent_state


def written(state: Tensor, new: Tensor, rows: Tensor) -> Tensor:
    """The state [B, ...] with the values of `new` written in place into the rows where `rows` [B] is True."""
    return torch.where(rows.view(-1, *[1] * (state.dim() - 1)), new.to(state.dtype), state, out=state)
