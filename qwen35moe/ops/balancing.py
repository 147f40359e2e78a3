r"""Losses on routers: load balancing, exact over any division of the batch, and the z-loss.

    load balancing   E sum_e f_e p_e        f_e = choices of expert e per token, p_e = mean softmax(logits)_e
    z-loss           mean of (log sum_e exp logits_e)^2

What is pooled is said, never implied. scope: f and p are means over all tokens that count ("batch"), or over those of
one sequence, and the loss is the mean over sequences ("sequence"). per_layer=False pools f and p over the layers
before the product, as transformers does, so that one layer's collapse can hide behind another; per_layer=True gives [L].

The loss of a batch is not the mean of the losses of its parts, since f and p multiply. `LoadBalance` gives every part
its exact share: value and gradient of the whole are the sums over the parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen35moe.ops.precision import wide_dtype

_SCALES = ("transformers", "top_k")


def load_balancing_loss(
    logits: Sequence[Tensor] | Tensor,
    indices: Sequence[Tensor] | Tensor,
    *,
    mask: Tensor | None = None,
    scope: str = "batch",
    sequences: Tensor | None = None,
    num_sequences: int | Tensor | None = None,
    per_layer: bool = False,
    normalize: str = "transformers",
) -> Tensor:
    r"""E sum_e f_e p_e. Differentiable in p; f are counts.

    logits and indices hold one [N, E] and [N, S] per layer; `indices` are those that were used. mask [N] is 1 for
    tokens that count. Fedus et al. 2021, eq. 4-6, as transformers has it: f and p are pooled over all layers before
    the product, and f sums to S, so an even load gives S. per_layer=True returns [L], one loss per layer;
    normalize="top_k" divides by S, so that an even load gives 1.

    scope="sequence" (DeepSeek-V3, eq. 17-20): f and p of each sequence by itself, the mean over sequences that have a
    token that counts. sequences [N] numbers them (`sequence_numbers`). num_sequences: the sum over that number instead,
    so that micro-batches of one batch add up to it exactly. Computed in float32 at least.
    """
    if normalize not in _SCALES:
        raise ValueError(f"normalize={normalize!r} is neither 'transformers' nor 'top_k'")
    if scope not in ("batch", "sequence"):
        raise ValueError(f"scope={scope!r} is neither 'batch' nor 'sequence'")
    if (scope == "sequence") != (sequences is not None):
        raise ValueError("scope='sequence' needs sequences=, the number of each token's sequence, and scope='batch' takes none")
    if len(logits) == 0 or len(logits) != len(indices):
        raise ValueError(f"the loss needs logits and indices of the same layers, got {len(logits)} and {len(indices)}")
    experts, slots = logits[0].shape[-1], indices[0].shape[-1]
    groups = 1 if sequences is None or sequences.numel() == 0 else int(sequences.max()) + 1
    sums = [_sums(*pair, mask, sequences, groups) for pair in zip(logits, indices, strict=True)]
    counts, probabilities = torch.stack([c for c, _, _ in sums]), torch.stack([p for _, p, _ in sums])  # [L, groups, E]
    tokens = sums[0][2]
    fractions = counts / tokens.clamp(min=1)[:, None]
    means = probabilities / tokens.clamp(min=1)[:, None]
    if not per_layer:
        fractions, means = fractions.mean(0), means.mean(0)
    loss = experts * (fractions * means).sum(-1)  # [(L,) groups]
    there = (tokens > 0).sum().clamp(min=1) if num_sequences is None else num_sequences
    loss = loss.sum(-1) / (1 if scope == "batch" else there)
    return loss / slots if normalize == "top_k" else loss


def router_z_loss(
    logits: Sequence[Tensor] | Tensor, *, mask: Tensor | None = None, per_layer: bool = False,
    num_tokens: int | Tensor | None = None,
) -> Tensor:
    r"""Mean over tokens and layers of (log sum_e exp logits_e)^2: keeps router logits small (Zoph et al. 2022, eq. 5).

    logits: one [N, E] per layer; mask [N] is 1 for tokens that count. per_layer=True returns [L]. num_tokens: the sum
    over tokens divided by it, so that the parts of a batch add up to it. Computed in float32 at least.
    """
    if len(logits) == 0:
        raise ValueError("the z-loss needs the logits of at least one layer")
    squares = torch.stack([layer.to(wide_dtype(layer)).logsumexp(-1).square() for layer in logits])  # [L, N]
    counts = torch.ones_like(squares[0]) if mask is None else mask.to(squares)
    squares = torch.where(counts > 0, squares * counts, 0)
    layers = squares.sum(1) / (counts.sum().clamp(min=1) if num_tokens is None else num_tokens)
    return layers if per_layer else layers.mean()


def sequence_numbers(shape: tuple[int, int], cu_seqlens: Tensor | None = None) -> Tensor:
    """[B*T]: the number of each token's sequence, rows of a batch (B, T) or the packed documents of one row."""
    rows, tokens = shape
    if cu_seqlens is None:
        return torch.arange(rows).repeat_interleave(tokens)
    places = torch.arange(rows * tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, places, right=True) - 1


class LoadBalance:
    r"""The load-balancing loss of a batch that is seen in parts: micro-batches, packed rows, data-parallel ranks.

    With c_e all choices of expert e and n all tokens of the batch, part m brings

        share_m = E sum_e (c_e / n) (sum over tokens of m of p_e) / n,        sum_m share_m = the loss of the whole,

    exactly, and its gradient too, because c carries none: what a part must know beforehand is how often the whole batch
    chooses each expert. So it takes two steps: `count` every part, then `share` every part.

        balance = LoadBalance(num_experts)
        for part in parts:                                # 1. counts: a forward without gradient, or routing known
            balance.count(routing.indices, routing.mask)  #    from a rollout that is replayed
        balance.all_reduce()                              #    data-parallel: over all ranks
        for part in parts:                                # 2.
            routing = model(..., output_routing=True).routing
            (cross_entropy + coefficient * balance.share(routing.logits, routing.mask)).backward()
        balance.value()                                   # the loss of the whole batch, for the log

    In a data-parallel run with one part per rank the counts of its own forward will do, one pass in all. Where
    gradients are averaged over ranks (DDP, FSDP), multiply the share by the number of ranks. share and value agree with
    `load_balancing_loss(..., per_layer=, normalize=)` of the whole batch, scope "batch".
    """

    def __init__(self, num_experts: int, *, per_layer: bool = False, normalize: str = "transformers") -> None:
        if normalize not in _SCALES:
            raise ValueError(f"normalize={normalize!r} is neither 'transformers' nor 'top_k'")
        self.num_experts, self.per_layer, self.normalize = num_experts, per_layer, normalize
        self.counts: Tensor | None = None  # [L, E] choices of experts, float64: exact up to 2^53
        self.probabilities: Tensor | None = None  # [L, E] sums of p over the tokens shared out so far
        self.tokens = torch.zeros((), dtype=torch.float64)
        self.slots = 0

    @torch.no_grad()
    def count(self, indices: Tensor, mask: Tensor | None = None) -> None:
        """Adds the choices [L, N, S] of a part; mask [N] is 1 for tokens that count."""
        if self.slots not in (0, indices.shape[-1]):
            raise ValueError(f"a part with {indices.shape[-1]} experts per token after parts with {self.slots}")
        counts_as = torch.ones(indices.shape[1], device=indices.device) if mask is None else mask.to(indices.device)
        counts_as = counts_as.double()
        part = torch.stack([_chosen(layer.long(), counts_as, self.num_experts) for layer in indices])
        self.counts = part if self.counts is None else self.counts + part.to(self.counts.device)
        self.tokens = self.tokens.to(part.device) + counts_as.sum()
        self.slots = indices.shape[-1]

    def share(self, logits: Sequence[Tensor] | Tensor, mask: Tensor | None = None) -> Tensor:
        """This part's share of the whole loss, from its logits, one [N, E] per layer; with gradient."""
        if self.counts is None:
            raise ValueError("nothing was counted: call count() with every part before the first share()")
        if len(logits) != self.counts.shape[0]:
            raise ValueError(f"logits of {len(logits)} layers, {self.counts.shape[0]} were counted")
        sums = torch.stack([_probabilities(layer, mask) for layer in logits])
        self.probabilities = sums.detach().double() + (0 if self.probabilities is None else self.probabilities)
        return self._loss(sums)

    @torch.no_grad()
    def value(self) -> Tensor:
        """The sum of all shares so far, in float64; after the last part, the loss of the whole batch."""
        if self.probabilities is None:
            raise ValueError("there was no share() yet")
        return self._loss(self.probabilities)

    def merge(self, other: LoadBalance) -> None:
        """Adds what another one counted and shared out."""
        if self.counts is None or other.counts is None:
            raise ValueError("merging needs counts on both sides")
        if self.slots != other.slots or self.counts.shape != other.counts.shape:
            sizes = [(*b.counts.shape, b.slots) for b in (self, other) if b.counts is not None]
            raise ValueError(f"(layers, experts, slots) {sizes[0]} and {sizes[1]} do not fit")
        self.counts = self.counts + other.counts.to(self.counts.device)
        self.tokens = self.tokens + other.tokens.to(self.tokens.device)
        if other.probabilities is not None:
            self.probabilities = other.probabilities + (0 if self.probabilities is None else self.probabilities)

    def all_reduce(self, group: object = None) -> None:
        """Adds the counts of all ranks of a torch.distributed group, so that every rank has those of the whole batch.

        Between counting and the first share. Every rank must have counted (a rank without tokens: indices [L, 0, S]).
        """
        import torch.distributed as dist

        if self.counts is None or self.probabilities is not None:
            raise ValueError("all_reduce() belongs between the last count() and the first share()")
        together = torch.cat([self.counts.flatten(), self.tokens[None]])
        dist.all_reduce(together, group=group)  # pyright: ignore[reportArgumentType]
        self.counts, self.tokens = together[:-1].view_as(self.counts), together[-1]

    def _loss(self, sums: Tensor) -> Tensor:
        assert self.counts is not None
        tokens = self.tokens.clamp(min=1).to(sums)
        fractions, means = self.counts.to(sums) / tokens, sums / tokens
        if not self.per_layer:
            fractions, means = fractions.mean(0), means.mean(0)
        loss = sums.shape[-1] * (fractions * means).sum(-1)
        return loss / self.slots if self.normalize == "top_k" else loss


def _sums(
    logits: Tensor, indices: Tensor, mask: Tensor | None, sequences: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Per group: choices [groups, E], sums of probabilities [groups, E], tokens [groups]; of one layer."""
    counts_as, (tokens, experts) = _counts_as(logits, mask), logits.shape
    group = torch.zeros(tokens, dtype=torch.long, device=logits.device) if sequences is None else sequences.to(logits.device)
    place = group[:, None] * experts + indices
    chosen = _chosen(place, counts_as, groups * experts).view(groups, experts)
    weighted = _weighted(logits, counts_as)
    if sequences is None:
        return chosen, weighted.sum(0, keepdim=True), counts_as.sum()[None]
    return chosen, weighted.new_zeros(groups, experts).index_add(0, group, weighted), _chosen(group[:, None], counts_as, groups)


def _chosen(indices: Tensor, counts_as: Tensor, experts: int) -> Tensor:
    """[E]: how often indices [N, S] name each expert, each row counted counts_as[n] times."""
    ones = counts_as[:, None].expand(indices.shape).reshape(-1)
    zeros = torch.zeros(experts, dtype=counts_as.dtype, device=indices.device)
    return zeros.index_add(0, indices.reshape(-1), ones)


def _weighted(logits: Tensor, counts_as: Tensor) -> Tensor:
    return logits.to(counts_as.dtype).softmax(-1) * counts_as[:, None]


def _probabilities(logits: Tensor, mask: Tensor | None) -> Tensor:
    """[E]: sum over tokens that count of softmax(logits [N, E])."""
    return _weighted(logits, _counts_as(logits, mask)).sum(0)


def _counts_as(logits: Tensor, mask: Tensor | None) -> Tensor:
    """[N], in float32 at least: the mask as numbers, ones without one."""
    dtype = wide_dtype(logits)
    return logits.new_ones(logits.shape[0], dtype=dtype) if mask is None else mask.to(logits.device, dtype)
