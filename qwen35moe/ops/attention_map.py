"""The gated delta rule as an attention map: the weight of each token's value in each output.

The rule is linear in the values. With the symbols of `ops.delta_chunked` and the whole row (or packed document) as one chunk of
T tokens,

    d_ij = exp(decay_{j+1} + ... + decay_i) for j <= i, else 0          p_ij = d_ij (q_i . k_j)
    a_ij = beta_i d_ij (k_i . k_j) for j < i, else 0                    x = (I + a)^-1 diag(beta)

its outputs and its last state are sums over the tokens, plus what the state before the first token gives:

    o_i = sum_j map_ij v_j + ...                map = p x
    S_T = sum_j (sum_i x_ij d_Ti k_i) (x) v_j + ...

The rest is the result of the rule for values of zero: rule(v, state) = map v + rule(0, state).

The map is causal as that of softmax attention, but its entries can be negative (a correction removes what the state already
holds for a key) and its rows do not sum to one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.ops.norm import l2_norm
from qwen35moe.ops.precision import wide_dtype, widen, without_autocast


@without_autocast
def attention_map(
    query: Tensor, key: Tensor, *, decay: Tensor, beta: Tensor, cu_seqlens: Tensor | None = None
) -> Tensor:
    """map_ij [B, H, T, T], float32 at least: the weight of value j (last axis) in output i.

    query, key [B, T, G, K], decay and beta [B, T, H], cu_seqlens [documents + 1] as in `ops.delta_rule`. Zero where the decay
    is below the floor of `decay_between`. Time and memory grow with T^3 and T^2: for analysis, not for running the layer.
    """
    query, key, decay, beta = widen(query, key, decay, beta)
    repeats = decay.shape[-1] // key.shape[2]
    q, k = (l2_norm(x).transpose(1, 2) for x in (query, key))  # [B, G, T, K]
    between = decay_between(decay, cu_seqlens)
    scores = (q @ k.mT * k.shape[-1] ** -0.5).repeat_interleave(repeats, dim=1) * between
    return _times_transform(scores, k, between, beta).masked_fill(between == 0, 0)


@without_autocast
def state_map(key: Tensor, *, decay: Tensor, beta: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """sum_i x_ij d_Ti k_i [B, H, T, K]: its outer product with v_j is the part of the last state that token j has written.

    Arguments as in `attention_map`. The last state is that of the token's row or document; the parts add up to it, except for
    what remains of the state before the first token.
    """
    key, decay, beta = widen(key, decay, beta)
    tokens, repeats = key.shape[1], decay.shape[-1] // key.shape[2]
    k = l2_norm(key).transpose(1, 2)
    between = decay_between(decay, cu_seqlens)
    last = torch.full((tokens,), tokens - 1, device=key.device)
    if cu_seqlens is not None:
        last = cu_seqlens.to(key.device)[1:][_document(tokens, cu_seqlens, key.device)] - 1
    to_end = between[..., last, torch.arange(tokens, device=key.device)]  # d_Tj [B, H, T]
    decayed_keys = k.mT.repeat_interleave(repeats, dim=1) * to_end[..., None, :]  # [B, H, K, T]
    return _times_transform(decayed_keys, k, between, beta).masked_fill(to_end[..., None, :] == 0, 0).mT


def _times_transform(rows: Tensor, k: Tensor, between: Tensor, beta: Tensor) -> Tensor:
    """rows x with x = (I + a)^-1 diag(beta): rows [B, H, rows, T], k [B, G, T, K], between [B, H, T, T], beta [B, T, H]."""
    beta = beta.transpose(1, 2)
    products = (k @ k.mT).repeat_interleave(beta.shape[1] // k.shape[1], dim=1)
    system = (products * between * beta[..., None]).tril(-1)
    solved = torch.linalg.solve_triangular(system, rows, upper=False, left=False, unitriangular=True)
    return solved * beta[..., None, :]


def decay_between(decay: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """d_ij [B, H, T, T] of decay [B, T, H]: 1 on the diagonal; 0 above it, between documents, and below 1e-13 (float64: 1e-35).

    Each exponent is summed on its own: a difference of two running sums has no correct digit of a small gate that follows a
    gate of -80.
    """
    tokens, device = decay.shape[1], decay.device
    upper = torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu()
    gates = decay.transpose(1, 2)[..., None].masked_fill(upper, 0)  # [.., i, j]: gate i for j < i
    logs = gates.cumsum(-2)
    hidden = upper.triu(1)
    if cu_seqlens is not None:
        document = _document(tokens, cu_seqlens, device)
        hidden = hidden | (document[:, None] != document)
    floor = -80.0 if wide_dtype(decay) == torch.float64 else -30.0
    return F.threshold(logs.masked_fill(hidden, float("-inf")), floor, float("-inf")).exp()


def _document(tokens: int, cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """[T]: the number of each token's document."""
    return torch.bucketize(torch.arange(tokens, device=device), cu_seqlens[1:].to(device), right=True)
