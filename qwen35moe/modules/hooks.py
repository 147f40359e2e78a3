"""Checks whether a fused implementation may compute what modules and methods would, without calling them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules import module as _module

# Hooks of every module of the process. The dicts are never rebound, so that this is one look at each.
_GLOBAL_HOOKS = (
    _module._global_forward_hooks, _module._global_forward_pre_hooks, _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module only computes the forward of `kind` from its parameters: it has no hook, nor has the process,
    no parametrization, no forward of its own, and its class is `kind` or inherits all methods that `kind` defines."""
    cls, own = type(module), module.__dict__
    if cls is not kind and not (issubclass(cls, kind) and _inherits(cls, kind)):
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    return "forward" not in own and "__call__" not in own and "parametrizations" not in module._modules and not any(_GLOBAL_HOOKS)


def keeps(module: nn.Module, kind: type[nn.Module], methods: Iterable[str]) -> bool:
    """Whether a module has these methods of `kind`, replaced neither in a subclass nor in the instance."""
    cls, own = type(module), module.__dict__
    if cls is kind:
        return own.keys().isdisjoint(methods)
    return own.keys().isdisjoint(methods) and all(getattr(cls, name) is getattr(kind, name) for name in methods)


def _inherits(cls: type[nn.Module], kind: type[nn.Module]) -> bool:
    """Whether a subclass of `kind` replaces no method that its forward may run."""
    names = ("forward", "__call__", "_call_impl", "__getattr__")
    return all(getattr(cls, name, None) is getattr(kind, name, None) for name in names)
