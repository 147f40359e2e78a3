"""Whether a fused form may read a module's weight without calling the module."""

from __future__ import annotations

from torch import nn


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether nothing is attached to a module's call: it has the forward of `kind`, and no hooks."""
    same = type(module).forward is kind.forward and "forward" not in module.__dict__
    return same and not module._forward_hooks and not module._forward_pre_hooks
