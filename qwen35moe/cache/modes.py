"""Tensors that outlive the mode in which they were made."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor


def in_inference_mode() -> bool:
    """torch.is_inference_mode_enabled(), which torch.compile cannot trace: there a constant of the trace."""
    return torch.is_inference_mode_enabled()


in_inference_mode._dynamo_marked_constant = True  # type: ignore[attr-defined]  # guarded by the inputs' dispatch keys


def ordinary_tensors() -> AbstractContextManager[object]:
    """Inside, new tensors are no inference tensors: those cannot be written outside of inference_mode, nor saved for a
    backward, and a cache is used in every mode."""
    if not torch.is_inference_mode_enabled():
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())  # inference_mode(False) also enables gradients
    return stack


def copied(tensor: Tensor) -> Tensor:
    """A copy that is no inference tensor; on the autograd graph where `tensor` is, in every mode."""
    with ordinary_tensors(), torch.set_grad_enabled(tensor.requires_grad):
        return tensor.clone()


def ordinary(tensor: Tensor) -> Tensor:
    """The tensor itself, a copy of an inference tensor."""
    return copied(tensor) if tensor.is_inference() else tensor
