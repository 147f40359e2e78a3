"""How a module runs its submodules: whether a fused implementation may compute what they would, in which dtype and on which
device they run.

A module in another dtype than its input runs in the dtype of its own weights: a float32 router, mixer or projection in a
bfloat16 model computes in float32. The residual stream and the cache keep their dtypes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from qwen35moe import ops
from qwen35moe.ops.cpu.packed_weight import PackedExperts, PackedMatrix
from qwen35moe.ops.cpu.products import ROWS, SMALL

FEW = ROWS[-1]  # rows with which a small projection calls its module
_ORDINARY = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
# Hooks of every module of the process. The dicts are never rebound, so that this is one look at each.
GLOBAL_PRE_HOOKS = _module._global_forward_pre_hooks
_GLOBAL_HOOKS = (
    _module._global_forward_hooks, GLOBAL_PRE_HOOKS, _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)

# The methods of classes as they were written: other libraries assign other ones to the class itself.
_WRITTEN: dict[type[nn.Module], dict[str, Any]] = {nn.Linear: {"forward": nn.Linear.forward}}
Module = TypeVar("Module", bound=type[nn.Module])


def fusible(kind: Module) -> Module:
    """Decorates a class whose instances `is_plain` and `keeps` check."""
    _WRITTEN[kind] = {name: value for name, value in vars(kind).items() if callable(value)}
    return kind


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module only computes the forward of `kind` from its parameters: it has no hook, nor has the process,
    no parametrization, no forward of its own, its class is `kind` or inherits all methods that `kind` defines, and `kind`
    has the forward with which it was defined."""
    cls, own = type(module), module.__dict__
    if kind.forward is not _WRITTEN[kind]["forward"]:
        return False
    if cls is not kind and not (issubclass(cls, kind) and _inherits(cls, kind)):
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    return "forward" not in own and "parametrizations" not in module._modules and not any(_GLOBAL_HOOKS)


def keeps(module: nn.Module, kind: type[nn.Module], methods: Iterable[str]) -> bool:
    """Whether a module has these methods of `kind`, replaced neither in a subclass, nor in the instance or the class."""
    cls, own, written = type(module), module.__dict__, _WRITTEN[kind]
    for name in methods:  # a loop, which torch.compile traces, unlike `isdisjoint`
        if name in own or getattr(cls, name) is not written[name]:
            return False
    return True


def _inherits(cls: type[nn.Module], kind: type[nn.Module]) -> bool:
    """Whether a subclass of `kind` replaces no method that its forward may run."""
    names = ("forward", "__call__", "_call_impl", "__getattr__")
    return all(getattr(cls, name, None) is getattr(kind, name, None) for name in names)


def project(linear: nn.Module, x: Tensor) -> Tensor:
    """linear(x), with x in the dtype of its weight: `ops.linear`, unless something is attached to the module."""
    weight: Any = linear._parameters.get("weight")
    if weight is not None and weight.dtype is x.dtype:
        small = weight.numel() < SMALL and x.numel() <= FEW * weight.shape[-1]
        if (small or not x.is_cpu) and ops.linear.is_ordinary(linear):
            return linear(x)
        if is_plain(linear, nn.Linear) and (type(weight) is nn.Parameter or type(weight) is PackedMatrix):
            return ops.linear(x, weight, linear.bias, caller=linear)
        return linear(x)
    if weight is None:
        weight = getattr(linear, "weight", None)  # of an adapter around a Linear, or a parametrized one
    return linear(in_dtype_of(weight, x))


def add_residual(hidden: Tensor, change: Tensor) -> Tensor:
    """hidden + change. The residual stream keeps its dtype, also where a layer has another one."""
    return hidden + (change if change.dtype is hidden.dtype else change.to(hidden.dtype))


def weight_of(module: nn.Module, kind: type[nn.Module], dtype: torch.dtype | None = None) -> Tensor | None:
    """The weight of a module without a bias, for a fused operation that reads it without calling the module. None where the
    call may compute something else than the forward of `kind`, for a weight that is no ordinary tensor, and for one that does
    not have `dtype`, if that is not None."""
    weight: Any = module._parameters.get("weight")
    if weight is None or (dtype is not None and weight.dtype is not dtype):
        return None
    if type(weight) is PackedMatrix or hasattr(type(weight), "__tensor_flatten__"):
        return None
    return weight if is_plain(module, kind) and module._parameters.get("bias") is None else None


def fused_projections(caller: nn.Module, x: Tensor, *linears: nn.Module) -> tuple[Tensor, ...] | None:
    """The products of x with the weights of the linears by a fused implementation of `ops.projections`; None where the caller
    runs them one by one."""
    weights = [] if torch.is_grad_enabled() else [weight_of(linear, nn.Linear, x.dtype) for linear in linears]
    if not weights or any(weight is None for weight in weights):
        return None
    return ops.projections.fused(x, *weights, caller=caller)  # pyright: ignore[reportArgumentType]


def in_dtype_of(weight: Any, x: Tensor) -> Tensor:
    """x in the dtype of a weight, except under autocast, which chooses the dtype, and for the codes of a quantised weight."""
    if not isinstance(weight, Tensor) or weight.dtype is x.dtype or not {weight.dtype, x.dtype} <= _ORDINARY:
        return x
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return x
    return x.to(weight.dtype)


def in_autocast_dtype(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """x and the weights of a product as autocast casts those of a linear map: in its dtype, except float64 and packed weights.
    Autocast replaces calls of torch's functions, and so has no effect on an operation with a kernel of its own."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x, *weights
    tensors = (x, *weights)
    for t in tensors:
        if t.dtype not in _ORDINARY or t.dtype == torch.float64 or isinstance(t, PackedMatrix | PackedExperts):
            return tensors
    return tuple(t.to(torch.get_autocast_dtype(kind)) for t in tensors)


def device_of(module: Any) -> torch.device:
    """The device of a module's weight. Of a weight that accelerate keeps elsewhere until it is used, the device to which its
    hook brings it."""
    device = module.weight.device
    if device.type == "meta":
        device = torch.device(getattr(getattr(module, "_hf_hook", None), "execution_device", None) or device)
    return device
