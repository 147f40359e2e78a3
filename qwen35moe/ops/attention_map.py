"""Who reads what from whom: the gated delta rule written as an attention map.

The rule is linear in the values. With unit queries and keys as in `ops.delta_rule` (queries divided by sqrt(K)) and the
decay between two positions

    D_ij = exp(decay_{j+1} + ... + decay_i) for j <= i of one document, else 0

its output and its memory are sums over the tokens, plus what the memory before the first one gives:

    output_i = sum_j A_ij v_j + ...        A = (Q K^T * D) (I + tril(beta K K^T * D, -1))^-1 diag(beta)      [T, T]
    memory   = sum_j p_j (x) v_j + ...     P = (D_end K)^T (I + tril(beta K K^T * D, -1))^-1 diag(beta)      [K, T]

p_j is column j of P. The rest, what is left of an initial memory, is the rule's own answer to values of zero:

    rule(v, state) = A v + rule(0, state)

A is causal like the map of softmax attention. Unlike that one it has signs (a correction takes back what the memory would
have recalled), and its rows do not sum to one.
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
    """A [B, H, T, T], float32 at least: how much of value j (last axis) is in the output at token i.

    query, key [B, T, G, K], decay and beta [B, T, H], cu_seqlens [documents + 1] as the rule takes them. Weights whose
    decay is below what `ops.delta_rule` counts as zero are zero. Time and memory grow with T^3 and T^2: for looking
    inside, not for running the layer.
    """
    query, key, decay, beta = widen(query, key, decay, beta)
    repeats = decay.shape[-1] // key.shape[2]
    q, k = (l2_norm(x).transpose(1, 2) for x in (query, key))  # [B, G, T, K]
    between = decay_between(decay, cu_seqlens)
    asked = (q @ k.mT * k.shape[-1] ** -0.5).repeat_interleave(repeats, dim=1) * between
    return _corrected(asked, k, between, beta).masked_fill(between == 0, 0)


@without_autocast
def writers(key: Tensor, *, decay: Tensor, beta: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """p [B, H, T, K]: with it, token j's share of the memory after the last token of its row or document is p_j (x) v_j.

    Arguments as in `attention_map`. The shares add up to the memory, less what is left of the one at the beginning.
    """
    key, decay, beta = widen(key, decay, beta)
    tokens, repeats = key.shape[1], decay.shape[-1] // key.shape[2]
    k = l2_norm(key).transpose(1, 2)
    between = decay_between(decay, cu_seqlens)
    last = torch.full((tokens,), tokens - 1, device=key.device)
    if cu_seqlens is not None:
        last = cu_seqlens.to(key.device)[1:][_document(tokens, cu_seqlens, key.device)] - 1
    place = torch.arange(tokens, device=key.device)
    to_end = between[..., last, place]  # [B, H, T]
    brought = k.mT.repeat_interleave(repeats, dim=1) * to_end[..., None, :]  # [B, H, K, T]
    return _corrected(brought, k, between, beta).masked_fill(to_end[..., None, :] == 0, 0).mT


def _corrected(rows: Tensor, k: Tensor, between: Tensor, beta: Tensor) -> Tensor:
    """rows (I + tril(beta K K^T * D, -1))^-1 diag(beta): rows [B, H, N, T], k [B, G, T, K], beta [B, T, H].

    Row l of the inverse says what token l really writes once the recalls of all tokens before it are taken off.
    """
    rate = beta.transpose(1, 2)
    recalls = (k @ k.mT).repeat_interleave(rate.shape[1] // k.shape[1], dim=1)
    system = (recalls * between * rate[..., None]).tril(-1)
    solved = torch.linalg.solve_triangular(system, rows, upper=False, left=False, unitriangular=True)
    return solved * rate[..., None, :]


def decay_between(decay: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """D [B, H, T, T] of decay [B, T, H]: 1 on the diagonal, 0 above it, between documents, and where nothing is left.

    Each exponent is summed on its own: behind a gate of -80 a difference of two running sums has lost the soft ones.
    """
    tokens, device = decay.shape[1], decay.device
    above = torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu()
    gates = decay.transpose(1, 2)[..., None].masked_fill(above, 0)  # [.., i, j]: gate i where it lies behind j
    logs = gates.cumsum(-2)
    unseen = above.triu(1)
    if cu_seqlens is not None:
        document = _document(tokens, cu_seqlens, device)
        unseen = unseen | (document[:, None] != document)
    floor = -80.0 if wide_dtype(decay) == torch.float64 else -30.0
    return F.threshold(logs.masked_fill(unseen, float("-inf")), floor, float("-inf")).exp()


def _document(tokens: int, cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """[T]: the number of each token's document."""
    return torch.bucketize(torch.arange(tokens, device=device), cu_seqlens[1:].to(device), right=True)
