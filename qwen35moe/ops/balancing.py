r"""Losses on routers: load balancing, exact for a batch that is processed in parts, and the z-loss.

    load balancing   E sum_e f_e p_e        f_e = assignments to expert e per token, p_e = mean softmax(logits)_e
    z-loss           mean of (log sum_e exp logits_e)^2

scope="batch": f_e and p_e are means over all unmasked tokens. scope="sequence": over those of one sequence, and the loss is the
mean over sequences. per_layer=False averages f_e and p_e over the layers before the product, as transformers does, so that one
layer's collapse can be hidden by another's opposite one; per_layer=True returns one loss per layer, [L].

The loss of a batch is not the mean of the losses of its parts, because f_e and p_e are multiplied. `LoadBalance` computes each
part's exact contribution: the loss of the batch and its gradient are the sums over the parts.
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
    r"""E sum_e f_e p_e. Differentiable in p_e; f_e are counts. Float32 at least.

    logits, indices: per layer the router's logits [N, E] and the experts that ran [N, k]. mask [N]: 1 for tokens that
    contribute to f_e and p_e, 0 for the others. Fedus et al. 2021, eq. 4-6, as in transformers: f_e and p_e are averaged over
    all layers before the product, and f_e sum to k, so that an even load gives k. per_layer=True returns [L], one loss per
    layer; normalize="top_k" divides by k, so that an even load gives 1.

    scope="sequence" (DeepSeek-V3, eq. 17-20): f_e and p_e of each sequence, and the mean over the sequences that have an
    unmasked token. sequences [N]: the number of each token's sequence (`sequence_numbers`). num_sequences: divide the sum over
    sequences by this number instead, so that the losses of micro-batches add up to that of their batch.
    """
    if normalize not in _SCALES:
        raise ValueError(f"normalize={normalize!r} is neither 'transformers' nor 'top_k'")
    if scope not in ("batch", "sequence"):
        raise ValueError(f"scope={scope!r} is neither 'batch' nor 'sequence'")
    if (scope == "sequence") != (sequences is not None):
        raise ValueError("scope='sequence' needs sequences=, the number of each token's sequence; scope='batch' takes none")
    if len(logits) == 0 or len(logits) != len(indices):
        raise ValueError(f"the loss needs logits and indices of the same layers, got {len(logits)} and {len(indices)}")
    experts, top_k = logits[0].shape[-1], indices[0].shape[-1]
    # A group is one sequence, or all tokens for scope="batch".
    groups = 1 if sequences is None or sequences.numel() == 0 else int(sequences.max()) + 1
    sums = [_sums(*layer, mask, sequences, groups) for layer in zip(logits, indices, strict=True)]
    counts, probabilities = torch.stack([c for c, _, _ in sums]), torch.stack([p for _, p, _ in sums])  # [L, groups, E]
    tokens = sums[0][2]  # [groups]
    fractions = counts / tokens.clamp(min=1)[:, None]
    means = probabilities / tokens.clamp(min=1)[:, None]
    if not per_layer:
        fractions, means = fractions.mean(0), means.mean(0)
    loss = experts * (fractions * means).sum(-1)  # [groups] or [L, groups]
    count = (tokens > 0).sum().clamp(min=1) if num_sequences is None else num_sequences
    loss = loss.sum(-1) / (1 if scope == "batch" else count)
    return loss / top_k if normalize == "top_k" else loss


def router_z_loss(
    logits: Sequence[Tensor] | Tensor, *, mask: Tensor | None = None, per_layer: bool = False,
    num_tokens: int | Tensor | None = None,
) -> Tensor:
    r"""Mean over tokens and layers of (log sum_e exp logits_e)^2: keeps router logits small (Zoph et al. 2022, eq. 5).

    logits: [N, E] per layer. mask [N]: 0 for tokens to leave out, else 1. per_layer=True returns [L]. num_tokens: divide the
    sum over tokens by this number, so that the losses of a batch's parts add up to that of the batch. Float32 at least.
    """
    if len(logits) == 0:
        raise ValueError("the z-loss needs the logits of at least one layer")
    wide = torch.stack([_counting(layer.to(wide_dtype(layer)), mask) for layer in logits])
    squares = wide.logsumexp(-1).square()  # [L, N]
    counts = torch.ones_like(squares[0]) if mask is None else mask.to(squares)
    squares = squares * counts
    layers = squares.sum(1) / (counts.sum().clamp(min=1) if num_tokens is None else num_tokens)
    return layers if per_layer else layers.mean()


@torch.no_grad()
def load_imbalance(indices: Sequence[Tensor] | Tensor, num_experts: int, *, mask: Tensor | None = None) -> Tensor:
    """[L]: the highest load of an expert divided by the mean load, E max_e f_e / sum_e f_e. 1 when the load of a layer is even,
    E/k at most; 0 in a layer without assignments. indices [N, k] per layer; mask [N]: 0 for tokens to leave out, else 1."""
    layers = []
    for chosen in indices:
        weights = _token_weights(chosen.float(), mask)
        layers.append(_counts(_counting(chosen, mask).long(), weights, num_experts))
    counts = torch.stack(layers)
    return num_experts * counts.amax(1) / counts.sum(1).clamp(min=1)


def sequence_numbers(shape: tuple[int, int], cu_seqlens: Tensor | None = None) -> Tensor:
    """[N]: the number of each token's sequence. Sequences are the rows of a batch of shape (B, T), or the packed documents of
    one row."""
    rows, tokens = shape
    if cu_seqlens is None:
        return torch.arange(rows, device="cpu").repeat_interleave(tokens)
    positions = torch.arange(rows * tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, positions, right=True) - 1


class LoadBalance:
    r"""The load-balancing loss of a batch that is processed in parts: micro-batches, packed rows, data-parallel ranks.

    With c_e assignments to expert e and N unmasked tokens in the whole batch, part i contributes

        share_i = E sum_e (c_e / N) (sum over the tokens of part i of p_e) / N,        sum_i share_i = the loss of the batch,

    exactly, and likewise its gradient, because c_e has none. A part's share needs c_e of the whole batch, hence two steps:
    `count` every part, then `share` every part.

        balance = LoadBalance(num_experts)
        for part in parts:                                # 1. counts: of a forward without gradient, or of a rollout's
            balance.count(routing.indices, routing.mask)  #    routing that the training step replays
        balance.all_reduce()                              #    data-parallel: over all ranks
        for part in parts:                                # 2.
            routing = model(..., output_routing=True).routing
            (cross_entropy + coefficient * balance.share(routing.logits, routing.mask)).backward()
        balance.value()                                   # the loss of the whole batch, for the log

    In a data-parallel run with one part per rank, count the part in the same forward: one pass in all. Where gradients are
    averaged over ranks (DDP, FSDP), multiply the share by the number of ranks. share and value agree with
    `load_balancing_loss(..., per_layer=, normalize=)` of the whole batch, scope "batch".
    """

    def __init__(self, num_experts: int, *, per_layer: bool = False, normalize: str = "transformers") -> None:
        if normalize not in _SCALES:
            raise ValueError(f"normalize={normalize!r} is neither 'transformers' nor 'top_k'")
        self.num_experts, self.per_layer, self.normalize = num_experts, per_layer, normalize
        self.counts: Tensor | None = None  # [L, E] assignments to experts, float64: exact up to 2^53
        self.probabilities: Tensor | None = None  # [L, E] sums of p_e over the tokens of all shares so far
        self.tokens = torch.zeros((), dtype=torch.float64, device="cpu")
        self.top_k = 0  # 0 before the first count

    @torch.no_grad()
    def count(self, indices: Tensor, mask: Tensor | None = None) -> None:
        """Add the assignments of a part: indices [L, N, k]; mask [N], 0 for tokens to leave out, else 1."""
        if self.top_k not in (0, indices.shape[-1]):
            raise ValueError(f"this part has {indices.shape[-1]} experts per token, the parts before it have {self.top_k}")
        token_weights = torch.ones(indices.shape[1], device=indices.device) if mask is None else mask.to(indices.device)
        token_weights = token_weights.double()
        part = torch.stack([_counts(_counting(layer, mask).long(), token_weights, self.num_experts) for layer in indices])
        self.counts = part if self.counts is None else self.counts + part.to(self.counts.device)
        self.tokens = self.tokens.to(part.device) + token_weights.sum()
        self.top_k = indices.shape[-1]

    def share(self, logits: Sequence[Tensor] | Tensor, mask: Tensor | None = None) -> Tensor:
        """This part's share of the loss of the batch, differentiable. logits: [N, E] per layer; mask as in `count`."""
        if self.counts is None:
            raise ValueError("no part was counted: call count() for every part before the first share()")
        if len(logits) != self.counts.shape[0]:
            raise ValueError(f"logits have {len(logits)} layers, the counted parts have {self.counts.shape[0]}")
        sums = torch.stack([_probabilities(layer, mask) for layer in logits])
        self.probabilities = sums.detach().double() + (0 if self.probabilities is None else self.probabilities)
        return self._loss(sums)

    @torch.no_grad()
    def value(self) -> Tensor:
        """The sum of all shares so far, in float64; after the last part, the loss of the whole batch."""
        if self.probabilities is None:
            raise ValueError("value() needs at least one share() before it")
        return self._loss(self.probabilities)

    def merge(self, other: LoadBalance) -> None:
        """Add the counts and shares of another LoadBalance."""
        if self.counts is None or other.counts is None:
            raise ValueError("merge() needs counts in both: call count() first")
        if self.top_k != other.top_k or self.counts.shape != other.counts.shape:
            sizes = [(*balance.counts.shape, balance.top_k) for balance in (self, other) if balance.counts is not None]
            raise ValueError(f"(layers, experts, experts per token) must agree, got {sizes[0]} and {sizes[1]}")
        self.counts = self.counts + other.counts.to(self.counts.device)
        self.tokens = self.tokens + other.tokens.to(self.tokens.device)
        if other.probabilities is not None:
            self.probabilities = other.probabilities + (0 if self.probabilities is None else self.probabilities)

    def all_reduce(self, group: object = None) -> None:
        """Sum the counts over all ranks of a torch.distributed group, after the last `count` and before the first `share`.

        Every rank must have called `count` (a rank without tokens with indices [L, 0, k]).
        """
        import torch.distributed as dist

        if self.counts is None or self.probabilities is not None:
            raise ValueError("call all_reduce() between the last count() and the first share()")
        counts_and_tokens = torch.cat([self.counts.flatten(), self.tokens[None]])
        dist.all_reduce(counts_and_tokens, group=group)  # pyright: ignore[reportArgumentType]
        self.counts, self.tokens = counts_and_tokens[:-1].view_as(self.counts), counts_and_tokens[-1]

    def _loss(self, sums: Tensor) -> Tensor:
        assert self.counts is not None
        tokens = self.tokens.clamp(min=1).to(sums)
        fractions, means = self.counts.to(sums) / tokens, sums / tokens
        if not self.per_layer:
            fractions, means = fractions.mean(0), means.mean(0)
        loss = sums.shape[-1] * (fractions * means).sum(-1)
        return loss / self.top_k if self.normalize == "top_k" else loss


def _sums(
    logits: Tensor, indices: Tensor, mask: Tensor | None, sequences: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one layer and each group: assignments [groups, E], sums of probabilities [groups, E], tokens [groups]."""
    token_weights, (tokens, experts) = _token_weights(logits, mask), logits.shape
    group = torch.zeros(tokens, dtype=torch.long, device=logits.device) if sequences is None else sequences.to(logits.device)
    counts = _counts(group[:, None] * experts + _counting(indices, mask), token_weights, groups * experts).view(groups, experts)
    weighted = _weighted(_counting(logits, mask), token_weights)
    if sequences is None:
        return counts, weighted.sum(0, keepdim=True), token_weights.sum()[None]
    sums = weighted.new_zeros(groups, experts).index_add(0, group, weighted)
    return counts, sums, _counts(group[:, None], token_weights, groups)


def _counts(indices: Tensor, token_weights: Tensor, experts: int) -> Tensor:
    """[E]: how often indices [N, k] contain each expert, the indices of token n counted token_weights[n] times."""
    ones = token_weights[:, None].expand(indices.shape).reshape(-1)
    zeros = torch.zeros(experts, dtype=token_weights.dtype, device=indices.device)
    return zeros.index_add(0, indices.reshape(-1), ones)


def _weighted(logits: Tensor, token_weights: Tensor) -> Tensor:
    return logits.to(token_weights.dtype).softmax(-1) * token_weights[:, None]


def _probabilities(logits: Tensor, mask: Tensor | None) -> Tensor:
    """[E]: sum over unmasked tokens of softmax(logits [N, E])."""
    return _weighted(_counting(logits, mask), _token_weights(logits, mask)).sum(0)


def _counting(values: Tensor, mask: Tensor | None) -> Tensor:
    """Logits [N, E] or indices [N, k] with zeros for masked tokens: what stands there, NaN too, reaches neither the loss nor a
    gradient."""
    return values if mask is None else values.masked_fill((mask == 0).to(values.device)[:, None], 0)


def _token_weights(logits: Tensor, mask: Tensor | None) -> Tensor:
    """[N], float32 at least: the mask as numbers, ones without a mask."""
    dtype = wide_dtype(logits)
    return logits.new_ones(logits.shape[0], dtype=dtype) if mask is None else mask.to(logits.device, dtype)
