"""Statistics of a routing. With c_e the number of tokens that chose expert e:

    load            f_e = c_e / sum c
    entropy         H = - sum_e f_e ln f_e            ln E when the load is even, 0 when one expert takes all
    imbalance       max_e f_e / mean_e f_e = E max f  1 when the load is even, E / k at most (k different experts a token)
    co-activation   C_ij = share of tokens that chose both i and j; C_ii: that chose i
    margin          the k-th largest logit of a token minus the next one: the change that would alter the choice

Unforced rows (-1) and padding do not count. Counts are exact integers, shares float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen35moe.ops.precision import wide_dtype

from .value import UNFORCED, Routing, check_range

_TOKENS_AT_ONCE = 16384  # counts of that many tokens are exact in float32


def expert_counts(routing: Routing) -> Tensor:
    """c [L, E], int64: how often each expert was chosen."""
    _check_num_experts(routing)
    flat = _without_padding(routing, routing.indices).flatten(1).long()
    counts = flat.new_zeros(flat.shape[0], routing.num_experts + 1)
    counts.scatter_add_(1, torch.where(flat < 0, routing.num_experts, flat), torch.ones_like(flat))
    return counts[:, : routing.num_experts]


def expert_load(routing: Routing) -> Tensor:
    """f [L, E]: the share of each expert in all choices; zeros in a layer without choices."""
    counts = expert_counts(routing).double()
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


def entropy(routing: Routing) -> Tensor:
    """H [L] of the load, in nats: - sum_e f_e ln f_e."""
    return torch.special.entr(expert_load(routing)).sum(1)


def imbalance(routing: Routing) -> Tensor:
    """[L]: the highest load divided by the mean load, E max_e f_e. It limits the speed of a layer spread over devices."""
    return expert_load(routing).amax(1) * routing.num_experts


def dead_experts(routing: Routing, below: float = 0.0) -> Tensor:
    """[L, E]: True for experts whose load is at most `below` times the even load 1/E; by default those never chosen."""
    if not 0 <= below < torch.inf:
        raise ValueError(f"below={below}: a share of the even load, 0 or more")
    return expert_load(routing) <= below / max(routing.num_experts, 1)


def coactivation(routing: Routing) -> Tensor:
    """C [L, E, E]: the share of tokens that chose both i and j; on the diagonal, that chose i."""
    _check_num_experts(routing)
    indices, experts = _without_padding(routing, routing.indices).long(), routing.num_experts
    together = torch.zeros(indices.shape[0], experts, experts, dtype=torch.float64, device=indices.device)
    for layer, rows in enumerate(indices):
        for part in rows.split(_TOKENS_AT_ONCE):
            chosen = torch.zeros(part.shape[0], experts + 1, device=part.device)
            chosen.scatter_(1, torch.where(part < 0, experts, part), 1.0)
            together[layer] += chosen[:, :experts].T @ chosen[:, :experts]
    return together / (indices >= 0).any(-1).sum(1).clamp(min=1)[:, None, None]


def margins(routing: Routing) -> Tensor:
    """[L, N]: the k-th largest logit minus the next one, for the N tokens without padding; inf when k = E.

    Only the logits count: for a forced routing it is the margin of the router's own choice.
    """
    if routing.logits is None:
        raise ValueError("margins need logits, and this routing has none: record it with output_routing=True")
    logits, k = _without_padding(routing, routing.logits), routing.indices.shape[-1]
    if k >= logits.shape[-1]:
        return logits.new_full(logits.shape[:2], torch.inf, dtype=wide_dtype(logits))
    largest = logits.topk(k + 1, dim=-1).values.to(wide_dtype(logits))
    return largest[..., -2] - largest[..., -1]


def flips(a: Routing, b: Routing) -> Tensor:
    """[L, N]: True where two routings of the same tokens chose different sets of experts; their order does not count."""
    indices_a, indices_b = _common_tokens(a, b)
    return (indices_a.sort(-1).values != indices_b.sort(-1).values).any(-1)


def agreement(a: Routing, b: Routing) -> Tensor:
    """[L]: the share of choices that two routings of the same tokens have in common, mean over tokens of
    |A_n and B_n| / k."""
    indices_a, indices_b = _common_tokens(a, b)
    common = (indices_a[..., :, None] == indices_b[..., None, :]).any(-1)
    return common.double().mean((1, 2))


def _without_padding(routing: Routing, values: Tensor) -> Tensor:
    """values [L, N, ...] without padding."""
    return values if routing.mask is None else values[:, routing.mask.to(values.device)]


def _common_tokens(a: Routing, b: Routing) -> tuple[Tensor, Tensor]:
    """The indices of both for the tokens that neither leaves unforced in a layer; ValueError for different tokens."""
    if a.indices.shape != b.indices.shape or a.layers != b.layers:
        raise ValueError(
            f"routings {list(a.indices.shape)} of layers {a.layers} and {list(b.indices.shape)} of layers {b.layers} "
            "have different tokens, layers or k"
        )
    if a.num_experts and b.num_experts and a.num_experts != b.num_experts:
        raise ValueError(f"the routings are of {a.num_experts} and of {b.num_experts} experts")
    common = ~(a.unforced | b.unforced.to(a.indices.device)).any(0)
    for mask in (a.mask, b.mask):
        if mask is not None:
            common &= mask.to(common.device)
    return a.indices[:, common].long(), b.indices.to(a.indices.device)[:, common].long()


def _check_num_experts(routing: Routing) -> None:
    if not routing.num_experts:
        raise ValueError("this routing has no number of experts: make it with num_experts=E")
    check_range(routing.indices, routing.num_experts, "the routing", lowest=UNFORCED)
