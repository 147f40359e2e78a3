"""The training loss: next-token cross entropy. Losses on routers are in balancing.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.backends import operation
from qwen35moe.ops.precision import wide_dtype

IGNORE = -100


def shift_labels(labels: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """labels [B, T] shifted by one token to the left, to the positions that predict them; -100 at the end of each row and of
    each packed document."""
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    if cu_seqlens is not None:
        starts = torch.zeros(labels.shape[1] + 1, dtype=torch.bool, device=labels.device)
        starts = starts.index_fill(0, cu_seqlens[1:].to(labels.device, torch.long), True)  # of the next document
        shifted = shifted.masked_fill(starts[1:], IGNORE)
    return shifted


def counting_rows(rows: Tensor, labels: Tensor) -> Tensor:
    """rows [N, D] with zeros where the label is -100: what stands there, NaN too, reaches neither the loss nor a gradient."""
    return rows.masked_fill((labels == IGNORE)[:, None], 0)


def cross_entropy(logits: Tensor, labels: Tensor, *, num_items: int | Tensor | None = None) -> Tensor:
    """Mean of -log softmax(logits)[label] over labels other than -100, or their sum over num_items.

    logits [N, vocabulary], labels [N]; float32 at least. If all labels are -100, the mean is nan, as in torch.
    """
    reduction = "mean" if num_items is None else "sum"
    logits = counting_rows(logits.to(wide_dtype(logits)), labels)
    loss = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction=reduction)
    return loss if num_items is None else loss / num_items


@operation(name="direct")
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, num_items: int | Tensor | None = None
) -> Tensor:
    """`cross_entropy(hidden weight^T, labels)`. hidden [N, D], weight [vocabulary, D], labels [N]."""
    return cross_entropy(F.linear(counting_rows(hidden, labels), weight), labels, num_items=num_items)
