"""One cached token of a Gated DeltaNet layer between its projections: convolution, gates, rule and gated norm.

    m = silu(sum_w W_conv[:, w] x_{t - W + 1 + w});  q, k, v = m
    decay = -exp(A_log) softplus(a + dt_bias);  beta = sigmoid(b)
    S' = exp(decay) S + k (x) beta (v - exp(decay) S^T k);  y = rms_norm(S'^T q / sqrt(K)) w silu(gate)

The definition composes the definitions of the other operations. The layer composes the operations themselves, unless a
fused implementation takes one token of every row: a Triton kernel of one launch, or the plain PyTorch form of
`ops.cpu.decode_step`.
"""

from __future__ import annotations

from torch import Tensor

from qwen35moe.backends import operation
from qwen35moe.ops.convolution import short_convolution
from qwen35moe.ops.delta_rule import decay_and_beta, gated_delta_rule
from qwen35moe.ops.norm import gated_rms_norm


@operation(composes=("short_convolution", "gated_delta_rule", "gated_rms_norm"))
def delta_net_step(
    qkv: Tensor, gate: Tensor, a: Tensor, b: Tensor, *, conv_state: Tensor, recurrent_state: Tensor, conv_weight: Tensor,
    A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor, groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The normed output [B, H, V] in qkv's dtype, and the states conv_state and recurrent_state after the token.

    qkv [B, C], gate [B, H, V], a and b [B, H], conv_state [B, C, W-1], recurrent_state [B, H, K, V] float32 at least,
    conv_weight [C, W], A_log and dt_bias [H], norm_weight [V]. groups: the number of key heads G.
    """
    heads, width, out = recurrent_state.shape[1:]
    mixed, conv_state = short_convolution.definition(qkv[:, None], conv_weight, state=conv_state)
    query, key, value = mixed.split([groups * width, groups * width, heads * out], dim=-1)
    decay, beta = decay_and_beta(a[:, None], b[:, None], A_log, dt_bias)
    core, recurrent_state = gated_delta_rule.definition(
        query.unflatten(-1, (groups, width)), key.unflatten(-1, (groups, width)), value.unflatten(-1, (heads, out)),
        decay=decay, beta=beta, state=recurrent_state,
    )
    return gated_rms_norm.definition(core[:, 0], gate, norm_weight, eps=eps), conv_state, recurrent_state
