"""Transforms of torch.func, forward-mode AD, and gradients of gradients through implementations with a backward of their own.

An implementation in plain, out-of-place PyTorch supports all of them. One with a written-out backward or with writes into
buffers says which it supports (`register(..., transforms=, double_backward=)`): under the others "auto" passes it over, and a
gradient of a gradient is computed through a composable form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

TRANSFORMS = ("grad", "jvp", "vmap")  # of torch.func (grad: also vjp, jacrev, ...); jvp: also torch.autograd.forward_ad

# None outside torch.func. A function of C, because every call of a conditional implementation asks.
_functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
interpreter: Callable[[], object] = _functorch.peek_interpreter_stack
# Of torch.autograd.grad(is_grads_batched=True), which batches without torch.func.
_is_batched: Callable[[Tensor], bool] = _functorch.is_legacy_batchedtensor


def active_transforms() -> tuple[str, ...]:
    """Those of `TRANSFORMS` that are active."""
    stack = _functorch.get_interpreter_stack() or ()
    names = {level.key().name.lower() for level in stack}
    if forward_ad._current_level >= 0:
        names.add("jvp")
    return tuple(name for name in TRANSFORMS if name in names)


def with_second_derivative(
    name: str, composable: Callable[..., Any] | None, fn: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any], cut: bool
) -> Any:
    """fn(*args, **kwargs), whose own backward gives the first derivative and that of `composable` all higher ones.

    composable: the same function in a form that autograd can differentiate any number of times; None: there is none, and a
    second derivative raises ValueError. name: of the implementation and operation, for the error. cut: whether fn's backward
    would add the gradient of zero, or an error, to a second derivative (it does not return None for no gradient).
    """
    if cut and any(isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values())):
        result = fn(*map(_first_order, args), **{key: _first_order(x) for key, x in kwargs.items()})
    else:
        result = fn(*args, **kwargs)
    outputs = result if isinstance(result, tuple) else (result,)
    differentiable = [i for i, x in enumerate(outputs) if isinstance(x, Tensor) and x.requires_grad]
    if not differentiable:
        return result
    values = (*args, *kwargs.values())
    places = [i for i, x in enumerate(values) if isinstance(x, Tensor)]

    def again(*inputs: Tensor) -> list[Tensor]:
        if composable is None:
            raise ValueError(f"{name} has no second derivative: choose another implementation with backends.use(...)")
        if kwargs.get("dropout"):
            raise ValueError(f"{name} has no second derivative with dropout: it would draw another mask; set dropout to 0")
        replaced = list(values)
        for place, x in zip(places, inputs, strict=True):
            replaced[place] = x
        again = composable(*replaced[: len(args)], **dict(zip(kwargs, replaced[len(args) :], strict=True)))
        again = again if isinstance(again, tuple) else (again,)
        return [again[i] for i in differentiable]

    tracked = _Composable.apply(
        again, len(differentiable), *(outputs[i] for i in differentiable), *(values[i] for i in places)
    )
    merged = list(outputs)
    for i, x in zip(differentiable, tracked, strict=True):  # pyright: ignore[reportArgumentType]
        merged[i] = x
    return tuple(merged) if isinstance(result, tuple) else merged[0]


def _first_order(x: Any) -> Any:
    return _FirstOrder.apply(x) if isinstance(x, Tensor) and x.requires_grad else x


class _FirstOrder(torch.autograd.Function):
    """The identity. Its backward lets gradients through unless they are differentiated: `_Composable` gives those."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        return None if torch.is_grad_enabled() else grads[0]


class _Composable(torch.autograd.Function):
    """The identity of a fused form's outputs. Its backward hands their gradients on to the fused backward, or, where the
    gradients themselves are differentiated or batched (is_grads_batched), computes those of the inputs through `again`."""

    @staticmethod
    def forward(ctx: Any, again: Callable[..., list[Tensor]], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.again, ctx.count = again, count
        ctx.save_for_backward(*tensors[count:])
        ctx.set_materialize_grads(False)
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[2 + ctx.count :]
        batched = interpreter() is not None or any(grad is not None and _is_batched(grad) for grad in grads)
        if not torch.is_grad_enabled() and not batched:
            return None, None, *grads, *(None for _ in needs)
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views: the gradients are those of these tensors, and their own graph goes on to what the inputs depend on.
            inputs = [x.view_as(x) if needed else x for x, needed in zip(ctx.saved_tensors, needs, strict=True)]
            outputs = ctx.again(*inputs)
            pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None and out.requires_grad]
            wanted = [x for x, needed in zip(inputs, needs, strict=True) if needed]
            gradients = iter(
                torch.autograd.grad(
                    [out for out, _ in pairs], wanted, [grad for _, grad in pairs], create_graph=create_graph, allow_unused=True
                )
            )
        return None, None, *(None for _ in range(ctx.count)), *(next(gradients) if needed else None for needed in needs)
