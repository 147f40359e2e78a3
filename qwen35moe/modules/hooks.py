"""Checks whether a fused implementation may read a module's weight without calling the module."""

from __future__ import annotations

from torch import nn


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module has the forward of `kind` and no hooks."""
    unchanged = type(module).forward is kind.forward and "forward" not in module.__dict__
    return unchanged and not module._forward_hooks and not module._forward_pre_hooks
