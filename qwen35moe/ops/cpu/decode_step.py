"""One cached token of a Gated DeltaNet layer on a CPU: `ops.decode_step` with few calls of PyTorch functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.ops.cpu.norm import normalise_
from qwen35moe.ops.decode_step import delta_net_step, written
from qwen35moe.ops.norm import l2_norm
from qwen35moe.ops.precision import wide_dtype, without_autocast

SKIPS = ("conv", "query", "key", "value", "decay", "beta", "core")  # tapped values that it does not materialise


@delta_net_step.implementation(
    "fused_cpu", device="cpu", compiles=False, skips=SKIPS, differentiable=False, transforms=()
)
@without_autocast
def delta_net_step_cpu(
    qkv: Tensor, gate: Tensor, a: Tensor, b: Tensor, *, conv_state: Tensor, recurrent_state: Tensor, conv_weight: Tensor,
    A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor, groups: int, eps: float, active: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The step without a backward, rounded once at the end. Without `active` it overwrites temporaries, never its arguments: a
    snapshot of the cache may share the recurrent state."""
    H, K, V = recurrent_state.shape[1:]
    dtype = wide_dtype(qkv, a, A_log)
    # As in `decay_and_beta`, here in fewer calls, each of which costs about 10 us when the caches hold no instruction of it.
    alpha = F.softplus(a.to(dtype) + dt_bias.to(dtype)).mul_(A_log.to(dtype).exp()).neg_().exp_()
    beta = b.to(dtype).sigmoid()
    window = torch.cat([conv_state.mT.to(qkv.dtype), qkv[:, None]], dim=1)  # [B, W, C]
    mixed = F.silu((window.to(dtype) * conv_weight.T.to(dtype)).sum(1), inplace=True)
    batch, keys = len(mixed), 2 * groups * K
    qk, v = mixed[:, :keys].view(batch, 2, groups, K), mixed[:, keys:].view(batch, H, V)  # `split` and `unflatten` are Python
    core, after = one_token(qk, v, alpha, beta, recurrent_state.to(dtype))
    if active is not None:
        after = written(recurrent_state, after, active)
    normed = normalise_(core, eps).mul_(norm_weight.to(dtype)).mul_(F.silu(gate.to(dtype)))
    return normed.to(qkv.dtype), window[:, 1:].mT, after


def one_token(qk: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of the delta rule that reads the state once: S_t^T q_t = (alpha_t S_{t-1})^T q_t + (k_t . q_t) w_t.

    w_t = beta_t (v_t - (alpha_t S_{t-1})^T k_t). qk [B, 2, G, K]: the query above the key, not normalised; v [B, H, V]; alpha =
    exp(decay) and beta [B, H]; state [B, H, K, V]; one dtype, float32 at least. Returns the output [B, H, V] and the state
    after the token.
    """
    B, H, K, V = state.shape
    rows, G = B * H, qk.shape[2]
    unit = l2_norm(qk).transpose(1, 2)[:, :, None].expand(-1, -1, H // G, -1, -1).reshape(rows, 2, K)
    decayed = state.reshape(rows, K, V) * alpha.reshape(rows, 1, 1)
    query_read, key_read = torch.bmm(unit, decayed).chunk(2, dim=1)
    write = torch.sub(v.reshape(rows, 1, V), key_read).mul_(beta.reshape(rows, 1, 1))
    query, key = unit.chunk(2, dim=1)
    output = query_read.addcmul_(torch.linalg.vecdot(query, key)[..., None], write).mul_(K**-0.5)
    return output.reshape(B, H, V), decayed.baddbmm_(key.mT, write).view(state.shape)
