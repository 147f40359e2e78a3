r"""What routings say in numbers. With c_e the number of times that expert e was chosen by tokens that are there:

    load            f_e = c_e / sum c
    entropy         H = - sum_e f_e ln f_e            ln E when the load is even, 0 when one expert takes all
    imbalance       max_e f_e / mean_e f_e = E max f  1 when the load is even, E / S at most (S different experts a token)
    co-activation   C_ij = share of tokens that chose both i and j; C_ii that chose i
    margin          the S-th largest logit of a token minus the next one: what would have to move for another choice

Free rows (-1) and padding do not count. Counts are exact integers, shares float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen35moe.ops.precision import wide_dtype

from .value import Routing

_TOKENS_AT_ONCE = 16384  # counts of that many tokens are exact in float32


def expert_counts(routing: Routing) -> Tensor:
    """c [L, E], int64: how often each expert was chosen."""
    _know_experts(routing)
    flat = _present(routing, routing.indices).flatten(1).long()
    counts = flat.new_zeros(flat.shape[0], routing.num_experts + 1)
    counts.scatter_add_(1, torch.where(flat < 0, routing.num_experts, flat), torch.ones_like(flat))
    return counts[:, : routing.num_experts]


def expert_load(routing: Routing) -> Tensor:
    """f [L, E]: the share of all choices that fell on each expert; zeros in a layer without choices."""
    counts = expert_counts(routing).double()
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


def entropy(routing: Routing) -> Tensor:
    """H [L] of the load, in nats: - sum_e f_e ln f_e."""
    return torch.special.entr(expert_load(routing)).sum(1)


def imbalance(routing: Routing) -> Tensor:
    """[L]: the highest load over the mean load, E max_e f_e. The time of a layer spread over devices follows it."""
    return expert_load(routing).amax(1) * routing.num_experts


def dead_experts(routing: Routing, below: float = 0.0) -> Tensor:
    """[L, E]: True for experts whose load is at most `below` times the even load 1/E; by default those never chosen."""
    return expert_load(routing) <= below / routing.num_experts


def coactivation(routing: Routing) -> Tensor:
    """C [L, E, E]: the share of tokens that chose both i and j; on the diagonal, of those that chose i."""
    _know_experts(routing)
    indices, experts = _present(routing, routing.indices).long(), routing.num_experts
    together = torch.zeros(indices.shape[0], experts, experts, dtype=torch.float64, device=indices.device)
    for layer, rows in enumerate(indices):
        for some in rows.split(_TOKENS_AT_ONCE):
            chose = torch.zeros(some.shape[0], experts + 1, device=some.device)
            chose.scatter_(1, torch.where(some < 0, experts, some), 1.0)
            together[layer] += chose[:, :experts].T @ chose[:, :experts]
    return together / (indices >= 0).any(-1).sum(1).clamp(min=1)[:, None, None]


def margins(routing: Routing) -> Tensor:
    """[L, N']: the S-th largest logit minus the next one, for the N' tokens that are there; inf when S = E.

    Of the logits, whoever chose: with a replayed routing it says how sure this router would have been.
    """
    if routing.logits is None:
        raise ValueError("margins are of logits, and this routing has none: capture it with output_routing=True")
    logits, slots = _present(routing, routing.logits), routing.indices.shape[-1]
    if slots >= logits.shape[-1]:
        return logits.new_full(logits.shape[:2], torch.inf, dtype=wide_dtype(logits))
    largest = logits.topk(slots + 1, dim=-1).values.to(wide_dtype(logits))
    return largest[..., -2] - largest[..., -1]


def flips(a: Routing, b: Routing) -> Tensor:
    """[L, N']: True where two captures of the same tokens chose different sets of experts, in whatever order."""
    both = _pairs(a, b)
    return (both[0].sort(-1).values != both[1].sort(-1).values).any(-1)


def agreement(a: Routing, b: Routing) -> Tensor:
    """[L]: the share of choices that two captures of the same tokens have in common, mean over tokens of
    |A_n and B_n| / S."""
    left, right = _pairs(a, b)
    common = (left[..., :, None] == right[..., None, :]).any(-1)
    return common.double().mean((1, 2))


def _present(routing: Routing, values: Tensor) -> Tensor:
    """[L, N', ...] of the tokens that are there."""
    return values if routing.mask is None else values[:, routing.mask.to(values.device)]


def _pairs(a: Routing, b: Routing) -> tuple[Tensor, Tensor]:
    """The indices of both where both have real rows in every layer; ValueError where they are not of the same tokens."""
    if a.indices.shape != b.indices.shape or a.layers != b.layers:
        raise ValueError(
            f"routings {list(a.indices.shape)} of layers {a.layers} and {list(b.indices.shape)} of layers {b.layers} "
            "are not of the same tokens and slots"
        )
    there = ~(a.free | b.free.to(a.indices.device)).any(0)
    for mask in (a.mask, b.mask):
        if mask is not None:
            there &= mask.to(there.device)
    return a.indices[:, there].long(), b.indices.to(a.indices.device)[:, there].long()


def _know_experts(routing: Routing) -> None:
    if not routing.num_experts:
        raise ValueError("this routing does not know the number of experts: make it with num_experts=E")
