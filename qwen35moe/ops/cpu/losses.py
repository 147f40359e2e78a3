"""The training loss without the logits of all tokens in memory. Contract in `ops.losses`."""

from __future__ import annotations

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qwen35moe.ops.losses import IGNORE, linear_cross_entropy
from qwen35moe.ops.precision import wide_dtype

_TOKENS_AT_ONCE = 512  # 512 rows of logits for a vocabulary of 248,320 are 0.5 GB in float32


@linear_cross_entropy.implementation("torch")
def chunked_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, num_items: int | Tensor | None = None
) -> Tensor:
    """A block of tokens at a time, forward and backward; the logits of a block are computed again in backward."""
    total = hidden.new_zeros((), dtype=wide_dtype(hidden))
    for start in range(0, hidden.shape[0], _TOKENS_AT_ONCE):
        rows = slice(start, start + _TOKENS_AT_ONCE)
        part = checkpoint(linear_cross_entropy.definition, hidden[rows], weight, labels[rows], num_items=1, use_reentrant=False)
        total = total + part
    return total / ((labels != IGNORE).sum() if num_items is None else num_items)
