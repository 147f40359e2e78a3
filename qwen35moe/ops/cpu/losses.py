"""The training loss without the logits of all tokens in memory. Contract in `ops.losses`.

A block of tokens at a time, forward and backward; the logits of a block are computed again in backward. The gradient of the
weight is summed over the blocks in float32 at least. Forward and backward are one `torch.library` operator each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.ops.cpu.products import input_gradient, product, weight_gradient
from qwen35moe.ops.losses import IGNORE, counting_rows, linear_cross_entropy
from qwen35moe.ops.precision import wide_dtype, without_autocast

_TOKENS_AT_ONCE = 512  # 512 rows of logits for a vocabulary of 248,320 are 0.5 GB in float32
_SUM = 2  # torch's number for reduction="sum"


@linear_cross_entropy.implementation("torch", transforms=(), double_backward=False)
def chunked_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, num_items: int | Tensor | None = None
) -> Tensor:
    """-log softmax(hidden weight^T)[label], summed in blocks of tokens."""
    if torch.is_autocast_enabled(hidden.device.type):  # as the linear map of the definition
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = (x.to(dtype) if x.dtype != torch.float64 else x for x in (hidden, weight))
    total = _summed(hidden, weight, labels.long())
    return total / ((labels != IGNORE).sum() if num_items is None else num_items)


def _log_probabilities(hidden: Tensor, weight: Tensor) -> Tensor:
    """log softmax(hidden weight^T) of a block, in float32 at least."""
    logits = product(hidden, weight)
    return logits.to(wide_dtype(logits)).log_softmax(-1)


@without_autocast
def _sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The sum over the tokens, float32 at least."""
    total = hidden.new_zeros((), dtype=wide_dtype(hidden))
    for start in range(0, hidden.shape[0], _TOKENS_AT_ONCE):
        rows = slice(start, start + _TOKENS_AT_ONCE)
        log_probabilities = _log_probabilities(counting_rows(hidden[rows], labels[rows]), weight)
        total = total + F.nll_loss(log_probabilities, labels[rows], ignore_index=IGNORE, reduction="sum")
    return total


@torch.library.custom_op("qwen35moe::linear_cross_entropy", mutates_args=())
def _summed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _sum(hidden, weight, labels)


@_summed.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return hidden.new_empty((), dtype=wide_dtype(hidden))


@without_autocast
def _backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, needs_grad: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight; an empty tensor for one that is not needed."""
    needs_hidden, needs_weight = needs_grad
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else hidden.new_empty(0)
    d_weight = torch.zeros(weight.shape, dtype=wide_dtype(weight), device=weight.device) if needs_weight else None
    for start in reversed(range(0, hidden.shape[0], _TOKENS_AT_ONCE)):
        rows = slice(start, start + _TOKENS_AT_ONCE)
        x, y = counting_rows(hidden[rows], labels[rows]), labels[rows]
        log_probabilities = _log_probabilities(x, weight)
        count = (y != IGNORE).sum().to(log_probabilities.dtype)
        d_log = torch.ops.aten.nll_loss_backward(grad, log_probabilities, y, None, _SUM, IGNORE, count)
        d_logits = torch.ops.aten._log_softmax_backward_data(d_log, log_probabilities, 1, log_probabilities.dtype)
        d_logits = d_logits.to(hidden.dtype)
        if needs_hidden:
            input_gradient(d_logits, weight, d_hidden[rows])
        if d_weight is not None:
            d_weight += weight_gradient(d_logits, x)
    return d_hidden, hidden.new_empty(0) if d_weight is None else d_weight.to(weight.dtype)


@torch.library.custom_op("qwen35moe::linear_cross_entropy_backward", mutates_args=())
def _gradients(
    grad: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, needs_grad: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    return _backward(grad, hidden, weight, labels, needs_grad)


@_gradients.register_fake
def _(grad: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, needs_grad: Sequence[bool]) -> tuple[Tensor, Tensor]:
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    empty = hidden.new_empty(0)
    return d_hidden if needs_grad[0] else empty, d_weight if needs_grad[1] else empty


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    needs = list(ctx.needs_input_grad[:2])
    d_hidden, d_weight = _gradients(grad, *ctx.saved_tensors, needs)
    return d_hidden if needs[0] else None, d_weight if needs[1] else None, None


_summed.register_autograd(_differentiate, setup_context=_setup)
