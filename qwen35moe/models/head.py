"""The language-model head: logits and loss through the module, whatever is attached to it.

    logits = W_head h;  loss = cross entropy of the logits, a block of tokens at a time where they are not returned

The fast form of the loss reads the weight of the head, so it is used for a plain nn.Linear only. An adapter, a hook, a
parametrisation, a bias, a subclass or a wrapper is called as a module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint

from qwen35moe import ops
from qwen35moe.modules.hooks import is_plain, project
from qwen35moe.ops.losses import IGNORE, cross_entropy
from qwen35moe.ops.precision import wide_dtype

_TOKENS_AT_ONCE = 512  # as in ops/cpu/losses.py
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def logits_of(head: Any, hidden: Tensor) -> Tensor:
    """head(hidden), computed in the wider of the two dtypes where the head has another one than the model."""
    dtype = dtype_of(head)
    if dtype is None or dtype == hidden.dtype or torch.is_autocast_enabled(hidden.device.type):
        return project(head, hidden)
    wide = torch.promote_types(dtype, hidden.dtype)
    if wide == dtype or not is_plain_linear(head):
        return head(hidden.to(dtype))
    return ops.linear(hidden.to(wide), head.weight.to(wide), caller=head)


def linear_loss(
    head: Any, hidden: Tensor, labels: Tensor, *, num_items: int | Tensor | None, caller: nn.Module
) -> Tensor:
    """The loss of hidden [N, D] and labels [N] without the logits of all tokens in memory."""
    if is_plain_linear(head):
        weight = head.weight
        if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            wide = torch.promote_types(weight.dtype, hidden.dtype)
            hidden, weight = hidden.to(wide), weight.to(wide)
        return ops.linear_cross_entropy(hidden, weight, labels, num_items=num_items, caller=caller)
    total = hidden.new_zeros((), dtype=wide_dtype(hidden))
    for start in range(0, hidden.shape[0], _TOKENS_AT_ONCE):
        rows = slice(start, start + _TOKENS_AT_ONCE)
        total = total + checkpoint(_block_loss, head, hidden[rows], labels[rows], use_reentrant=False)
    return total / ((labels != IGNORE).sum() if num_items is None else num_items)


def is_plain_linear(head: Any) -> bool:
    """Whether a head is F.linear with its weight and nothing else. Quantised and sharded weights are tensors of other kinds."""
    plain = isinstance(head, nn.Linear) and head.bias is None and is_plain(head, nn.Linear)
    return plain and not is_traceable_wrapper_subclass(head.weight)


def dtype_of(module: Any) -> torch.dtype | None:
    """The floating dtype of a module's weight; None where it has none, as after quantisation."""
    dtype = getattr(getattr(module, "weight", None), "dtype", None)
    return dtype if dtype in _FLOATS else None


def _block_loss(head: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits_of(head, hidden), labels, num_items=1)
