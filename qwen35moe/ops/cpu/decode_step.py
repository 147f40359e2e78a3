"""One cached token of a Gated DeltaNet layer on a CPU: `ops.decode_step` without the cost of several dispatches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.ops.cpu.norm import normalise_
from qwen35moe.ops.decode_step import delta_net_step
from qwen35moe.ops.delta_rule import decay_and_beta
from qwen35moe.ops.norm import l2_norm
from qwen35moe.ops.precision import without_autocast

SKIPS = ("conv", "query", "key", "value", "decay", "beta", "core")  # named values that a fused step does not materialise


@delta_net_step.implementation("fused_cpu", device="cpu", compiles=False, skips=SKIPS, differentiable=False)
@without_autocast
def delta_net_step_cpu(
    qkv: Tensor, gate: Tensor, a: Tensor, b: Tensor, *, conv_state: Tensor, recurrent_state: Tensor, conv_weight: Tensor,
    A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor, groups: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The step without a backward, rounded once at the end. It writes over its own temporaries, never over its arguments:
    a snapshot may share the recurrent state."""
    heads, width, out = recurrent_state.shape[1:]
    decay, beta = decay_and_beta(a, b, A_log, dt_bias)
    dtype = torch.promote_types(decay.dtype, qkv.dtype)
    window = torch.cat([conv_state.mT.to(qkv.dtype), qkv[:, None]], dim=1)  # [B, W, C]
    mixed = F.silu((window.to(dtype) * conv_weight.T.to(dtype)).sum(1), inplace=True)
    query_key, value = mixed.split([2 * groups * width, heads * out], dim=-1)
    qk, v = query_key.unflatten(-1, (2, groups, width)), value.unflatten(-1, (heads, out))
    core, recurrent_state = one_token(qk, v, decay.exp_(), beta, recurrent_state.to(dtype))
    normed = normalise_(core, eps).mul_(norm_weight.to(dtype)).mul_(F.silu(gate.to(dtype)))
    return normed.to(qkv.dtype), window[:, 1:].mT, recurrent_state


def one_token(qk: Tensor, v: Tensor, kept: Tensor, beta: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the delta rule, with one reading of the state for both products: S'^T q = (e^decay S)^T q + (k . q) write.

    qk [B, 2, G, K]: the query above the key, not normalised; v [B, H, V]; kept = e^decay and beta [B, H]; before
    [B, H, K, V]; one dtype, float32 at least. Returns the output [B, H, V] and the state after the token.
    """
    batch, heads, width, out = before.shape
    rows, groups = batch * heads, qk.shape[2]
    unit = l2_norm(qk).transpose(1, 2)[:, :, None].expand(-1, -1, heads // groups, -1, -1).reshape(rows, 2, width)
    state = before.reshape(rows, width, out) * kept.reshape(rows, 1, 1)
    by_query, by_key = torch.bmm(unit, state).chunk(2, dim=1)
    write = torch.sub(v.reshape(rows, 1, out), by_key).mul_(beta.reshape(rows, 1, 1))
    query, key = unit.chunk(2, dim=1)
    output = by_query.addcmul_(torch.linalg.vecdot(query, key)[..., None], write).mul_(width**-0.5)
    return output.reshape(batch, heads, out), state.baddbmm_(key.mT, write).view(before.shape)
