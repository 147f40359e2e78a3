"""One token of a Gated DeltaNet layer between its projections: convolution, gates, rule and gated norm in one operation.

    m = silu(sum_w W_conv[:, w] x_{t - W + 1 + w});  q, k, v = m
    decay = -exp(A_log) softplus(a + dt_bias);  beta = sigmoid(b)
    S' = exp(decay) S + k (x) beta (v - exp(decay) S^T k);  y = rms_norm(S'^T q / sqrt(K)) w silu(gate)

The definition below composes the other operations. The layer itself does so too, unless a fused implementation takes
one token of every row: a kernel of one launch, or on a CPU the plain PyTorch form, which saves what dispatching costs and
what the blocks of the forms for many tokens would.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen35moe import backends
from qwen35moe.ops.convolution import short_convolution
from qwen35moe.ops.delta_rule import one_token, recurrent_gated_delta_rule
from qwen35moe.ops.norm import gated_rms_norm, normalised
from qwen35moe.ops.precision import wide_dtype, without_autocast


def delta_net_step(
    qkv: Tensor, gate: Tensor, a: Tensor, b: Tensor, *, conv_state: Tensor, recurrent_state: Tensor, conv_weight: Tensor,
    A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor, groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The normed output [B, H, V] in qkv's dtype, and the inputs [B, C, W-1] and memory [B, H, K, V] after the token.

    qkv [B, C], gate [B, H, V], a and b [B, H], inputs [B, C, W-1], memory [B, H, K, V] float32 at least, conv_weight
    [C, W], A_log and dt_bias [H], norm_weight [V]. groups: the number of key heads G.
    """
    heads, width, out = recurrent_state.shape[1:]
    mixed, conv_state = short_convolution(qkv[:, None], conv_weight, state=conv_state)
    query, key, value = mixed.split([groups * width, groups * width, heads * out], dim=-1)
    dtype = wide_dtype(qkv, A_log)
    decay = -A_log.to(dtype).exp() * F.softplus(a.to(dtype) + dt_bias.to(dtype))
    core, recurrent_state = recurrent_gated_delta_rule(
        query.unflatten(-1, (groups, width)), key.unflatten(-1, (groups, width)), value.unflatten(-1, (heads, out)),
        decay=decay[:, None], beta=b.to(dtype).sigmoid()[:, None], state=recurrent_state,
    )
    return gated_rms_norm(core[:, 0], gate, norm_weight, eps=eps), conv_state, recurrent_state


@without_autocast
def inplace_delta_net_step(
    qkv: Tensor, gate: Tensor, a: Tensor, b: Tensor, *, conv_state: Tensor, recurrent_state: Tensor, conv_weight: Tensor,
    A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor, groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same without a backward, rounded once at the end; arithmetic in place, but never on what was given: a snapshot
    may share the memory."""
    heads, width, out = recurrent_state.shape[1:]
    dtype = wide_dtype(qkv, A_log)
    window = torch.cat([conv_state.mT.to(qkv.dtype), qkv[:, None]], dim=1)  # [B, W, C]
    mixed = F.silu((window.to(dtype) * conv_weight.T.to(dtype)).sum(1), inplace=True)
    query_key, value = mixed.split([2 * groups * width, heads * out], dim=-1)
    kept = F.softplus(a.to(dtype) + dt_bias.to(dtype)).mul_(A_log.to(dtype).exp()).neg_().exp_()
    qk, v = query_key.unflatten(-1, (2, groups, width)), value.unflatten(-1, (heads, out))
    core, recurrent_state = one_token(qk, v, kept, b.to(dtype).sigmoid(), recurrent_state.to(dtype))
    normed = normalised(core, eps).mul_(norm_weight.to(dtype)).mul_(F.silu(gate.to(dtype)))
    return normed.to(qkv.dtype), window[:, 1:].mT, recurrent_state


def _cannot_be_in_place(qkv: Tensor, *args: Tensor, **options: Tensor | float) -> str | None:
    if qkv.device.type != "cpu":
        return f"qkv is on {qkv.device}, not on a CPU"
    return "a graph is being compiled" if torch.compiler.is_compiling() else None


SKIPS = ("conv", "query", "key", "value", "decay", "beta", "core")  # the named values that a fused step never forms
_COMPOSED = ("short_convolution", "gated_delta_rule", "gated_rms_norm")


def fused_step_may_run(caller: nn.Module) -> bool:
    """Whether anything but the definition could run `caller`'s step: something registered in front of it that can run
    on this machine, or chosen by name. Choosing a form of an operation that a fused step contains rules it out."""
    choice = backends.choice_of("delta_net_step", caller)
    if choice is not None:
        return choice != "torch"
    if torch.is_grad_enabled() or any(backends.choice_of(operation, caller) for operation in _COMPOSED):
        return False
    names = [entry.name for entry in backends.implementations("delta_net_step") if not entry.missing]
    return names[0] != "torch"


def _cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Iterator[tuple[tuple, dict]]:
    for batch, groups, heads, width, out, taps in ((3, 2, 4, 8, 12, 4), (1, 1, 3, 16, 8, 2)):
        channels = 2 * groups * width + heads * out
        wide = torch.promote_types(torch.float32, dtype)

        def random(*shape: int, to: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, to)

        args = random(batch, channels), random(batch, heads, out), random(batch, heads), random(batch, heads)
        yield args, {
            "conv_state": random(batch, channels, taps - 1), "recurrent_state": random(batch, heads, width, out, to=wide),
            "conv_weight": random(channels, taps), "A_log": random(heads, to=wide), "dt_bias": random(heads, to=wide),
            "norm_weight": random(out, to=wide), "groups": groups, "eps": 1e-6,
        }


backends.register(
    "delta_net_step", "fused_cpu", inplace_delta_net_step, _cannot_be_in_place, skips=SKIPS, differentiable=False
)
backends.register("delta_net_step", "torch", delta_net_step)
backends.add_cases("delta_net_step", delta_net_step, _cases)
