"""The forms of `products` as implementations of `linear`. Contract in `ops.linear`.

Each is passed over where a measurement on this machine finds another one faster for the dtype and the number of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen35moe.backends.transforms import forward_ad, interpreter
from qwen35moe.ops.cpu import products
from qwen35moe.ops.linear import linear


class _Linear(torch.autograd.Function):
    """y = x W^T by a form; dx = dy W, dW = dy^T x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, form: products.Form) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return form(x, weight, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        if grad is None:
            return None, None, None
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        dx = products.input_gradient(grad, weight) if needs_x else None
        return dx, products.weight_gradient(grad, x) if needs_weight else None, None


def pick(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """The form that "auto" runs, without going through the list: a projection of one token takes few microseconds."""
    if torch.compiler.is_compiling():
        return None
    if weight.is_mkldnn:
        if x.dtype is not weight.dtype or torch.is_autocast_enabled("cpu") or torch._C._len_torch_dispatch_stack():
            return None
    else:
        if not x.is_cpu or x.dtype is not weight.dtype:
            return "torch"
        if not products.plain(x, weight) or torch.is_autocast_enabled("cpu"):
            return "torch"
    if interpreter() is not None or forward_ad._current_level >= 0:
        return None
    graph = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    name = "packed" if weight.is_mkldnn else products.fastest(x.numel() // max(1, x.shape[-1]), weight)
    return None if graph and name in _WITHOUT_GRADIENT else name


def _run(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    form, rows = products.FORMS[name], x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        y: Tensor = _Linear.apply(rows, weight, form)  # pyright: ignore[reportAssignmentType]
    else:
        y = form(rows, weight, None)
    if bias is not None:
        y = y + bias
    return y if x.dim() == 2 else y.view(*x.shape[:-1], len(weight))


def _unsupported(name: str, x: Tensor, weight: Tensor) -> str | None:
    if weight.is_mkldnn:
        if name != "packed":
            return "the weight is packed"
        if not products.plain(x):
            return "a tensor is a subclass, or a dispatch mode is active"
    elif not products.plain(x, weight):
        return "a tensor is a subclass, or a dispatch mode is active"
    if x.dtype is not weight.dtype:
        return f"x is {x.dtype}, the weight {weight.dtype}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is enabled"
    return None if weight.is_mkldnn else products.refusal(name, x.numel() // max(1, x.shape[-1]), weight)


def _slower(name: str, x: Tensor, weight: Tensor) -> str | None:
    if weight.is_mkldnn:
        return None
    best = products.fastest(x.numel() // max(1, x.shape[-1]), weight)
    return None if best == name else _FASTER[best]


_FASTER = {name: f"{name} is as fast or faster for this dtype and number of rows on this machine" for name in products.FORMS}
_WITHOUT_GRADIENT = ("packed", "gemv")


def _missing(name: str) -> str | None:
    """The reason why a form cannot be of use on this machine."""
    if name not in ("split", "widened") and not products.has_onednn():
        return "this build of torch has no oneDNN"
    if name in ("gemv", "transposed") and not products.multiplies(torch.bfloat16):
        return "oneDNN has no bfloat16 products on this processor, so torch uses its own"
    return None


def _register(name: str) -> None:
    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _run(name, x, weight, bias)

    def unsupported(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
        return _unsupported(name, x, weight)

    def slower(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
        return _slower(name, x, weight)

    linear.implementation(
        name, unsupported, missing=_missing(name), slower=slower, differentiable=name not in _WITHOUT_GRADIENT, device="cpu",
        compiles=False, transforms=(), double_backward=False,
    )(run)


for _name in ("packed", "gemv", "transposed", "onednn", "split", "widened"):
    _register(_name)
linear.pick = pick
