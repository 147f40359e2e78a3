"""Training losses: next-token cross entropy, with and without logits in memory, and expert load balancing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qwen35moe import backends
from qwen35moe.ops.precision import wide_dtype

IGNORE = -100
_TOKENS_AT_ONCE = 512  # 512 rows of a 248,320 word vocabulary are 0.5 GB in float32


def shift_labels(labels: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """labels [B, T] of the tokens to the labels of their predictions: one to the left, -100 at the end of each row
    and of each packed document."""
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    if cu_seqlens is not None:
        ends = cu_seqlens[1:].to(labels.device) - 1
        shifted = shifted.index_fill(1, ends[ends >= 0], IGNORE)
    return shifted


def cross_entropy(logits: Tensor, labels: Tensor, *, num_items: int | Tensor | None = None) -> Tensor:
    """Mean of -log softmax(logits)[label] over labels other than -100, or their sum over num_items.

    logits [N, vocabulary], labels [N]; float32 at least. With no label at all the mean is nan, as in torch.
    """
    reduction = "mean" if num_items is None else "sum"
    loss = F.cross_entropy(logits.to(wide_dtype(logits)), labels, ignore_index=IGNORE, reduction=reduction)
    return loss if num_items is None else loss / num_items


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, num_items: int | Tensor | None = None
) -> Tensor:
    """`cross_entropy(hidden weight^T, labels)`, the definition. hidden [N, D], weight [vocabulary, D], labels [N]."""
    return cross_entropy(F.linear(hidden, weight), labels, num_items=num_items)


def chunked_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, num_items: int | Tensor | None = None
) -> Tensor:
    """The same some hundred tokens at a time, forward and backward, so that the logits never lie in memory whole."""
    total = hidden.new_zeros((), dtype=wide_dtype(hidden))
    for start in range(0, hidden.shape[0], _TOKENS_AT_ONCE):
        rows = slice(start, start + _TOKENS_AT_ONCE)
        part = checkpoint(linear_cross_entropy, hidden[rows], weight, labels[rows], num_items=1, use_reentrant=False)
        total = total + part
    return total / ((labels != IGNORE).sum() if num_items is None else num_items)


def load_balancing_loss(
    logits: Sequence[Tensor],
    indices: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    per_layer: bool = False,
    normalize: str = "transformers",
) -> Tensor:
    r"""E sum_e f_e p_e: f_e the experts chosen per token, p_e the mean probability of expert e. Differentiable in p.

    logits and indices hold one [N, E] and [N, S] per layer; `indices` are those that were used. mask [N] is 1 for
    tokens that count. Fedus et al. 2021, eq. 4-6, as transformers has it: f and p are pooled over all layers before
    the product, and f sums to S, so an even load gives S. per_layer=True returns [L], one loss per layer;
    normalize="top_k" divides by S, so that an even load gives 1.
    """
    if normalize not in ("transformers", "top_k"):
        raise ValueError(f"normalize={normalize!r} is neither 'transformers' nor 'top_k'")
    if len(logits) == 0 or len(logits) != len(indices):
        raise ValueError(f"the loss needs logits and indices of the same layers, got {len(logits)} and {len(indices)}")
    experts, slots = logits[0].shape[-1], indices[0].shape[-1]
    shares = [_shares(*pair, mask) for pair in zip(logits, indices, strict=False)]
    fractions = torch.stack([f for f, _ in shares])
    probabilities = torch.stack([p for _, p in shares])
    if not per_layer:
        fractions, probabilities = fractions.mean(0), probabilities.mean(0)
    loss = experts * (fractions * probabilities).sum(-1)
    return loss / slots if normalize == "top_k" else loss


def _shares(logits: Tensor, indices: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """f [E] and p [E] of one layer."""
    dtype, (tokens, experts) = wide_dtype(logits), logits.shape
    counts_as = torch.ones(tokens, dtype=dtype, device=logits.device) if mask is None else mask.to(logits.device, dtype)
    total = counts_as.sum().clamp(min=1)
    ones = counts_as[:, None].expand(indices.shape).reshape(-1)
    chosen = torch.zeros(experts, dtype=dtype, device=logits.device).index_add(0, indices.reshape(-1), ones)
    probability = (logits.to(dtype).softmax(-1) * counts_as[:, None]).sum(0)
    return chosen / total, probability / total


def _cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Iterator[tuple[tuple, dict]]:
    for tokens, width, words in ((7, 12, 31), (600, 5, 17)):
        hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(device, dtype)
        weight = torch.randn(words, width, generator=generator, dtype=torch.float64).to(device, dtype)
        labels = torch.randint(0, words, (tokens,), generator=generator).to(device)
        labels[1] = IGNORE
        yield (hidden, weight, labels), {}
        yield (hidden, weight, labels), {"num_items": 5}


backends.register("linear_cross_entropy", "torch", chunked_linear_cross_entropy)
backends.register("linear_cross_entropy", "direct", linear_cross_entropy)
backends.add_cases("linear_cross_entropy", linear_cross_entropy, _cases)
