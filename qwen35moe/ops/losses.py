"""The training loss: next-token cross entropy, with and without logits in memory. The routers' losses: balancing.py."""

from __future__ import annotations

from collections.abc import Iterator

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
