"""A layer's experts as separate modules, for adapters, quantisers and hooks that work on nn.Linear.

The weights of the Linears are views of the grouped parameters: no weight is stored twice, and an optimizer step on one changes
the other. Names are those of transformers' per-expert layout: `experts.7.gate_proj.weight`, `.up_proj.weight`,
`.down_proj.weight`.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qwen35moe import ops
from qwen35moe.backends import choice_of
from qwen35moe.modules.interrupted import InterruptedCall
from qwen35moe.modules.moe import MLP, Experts
from qwen35moe.ops.experts import Tap, by_expert

_GROUPED = ("gate_up_proj", "down_proj")


class UnfusedExperts(nn.ModuleList):
    """`Experts` as a list of E MLPs whose weights are views of its gate_up_proj [E, 2F, D] and down_proj [E, D, F].

    The forward calls every chosen expert and its Linears once, with a tap or without, so that their hooks run. `grouped`
    returns the module with the grouped parameters, `fuse` the same with their gradients. Both need plain Linears: merge and
    remove adapters first. The grouped parameters themselves are not kept: a quantiser that replaces the weights frees their
    memory. The number of rows of each expert is read on the host, which is a graph break under torch.compile.
    """

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.__dict__["backend_choices"] = experts.__dict__.get("backend_choices", {})
        count, width, inner = experts.down_proj.shape
        self.__dict__["shapes"] = {"gate_up_proj": (count, 2 * inner, width), "down_proj": (count, width, inner)}
        # `fuse` gives these objects back if they still exist then (an optimizer may hold them).
        self.__dict__["alive"] = {"experts": weakref.ref(experts)}
        self.__dict__["alive"] |= {name: weakref.ref(getattr(experts, name)) for name in _GROUPED}
        self.__dict__["empty"] = _without_weights(experts)  # not a submodule: the Linears have its parameters
        with torch.device("meta"):
            self.extend(MLP(width, inner, experts.initializer_range) for _ in range(count))
        for linear, name, view in self._views():
            linear.weight = nn.Parameter(view(getattr(experts, name).detach()), getattr(experts, name).requires_grad)
            grad = getattr(experts, name).grad
            linear.weight.grad = None if grad is None else view(grad)
        self.train(experts.training)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "alive"} | {"alive": {}}

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor, tap: Tap | None = None) -> Tensor:
        """See `Experts.forward`: hidden [N, D], indices and weights [N, k]; returns [N, D], summed in float32 at least."""
        choice = choice_of(ops.experts.name, self)
        if choice is not None:
            raise ValueError(f"backend={choice!r} cannot run experts: they are unfused; call model.fuse_experts() first")
        if tap is None:  # every expert is called as a module, so that its hooks run
            return by_expert(hidden, indices, weights, len(self), lambda expert, x: self[expert](x), _unchanged)
        calls: dict[int, InterruptedCall] = {}

        def activate(expert: int, x: Tensor) -> Tensor:
            calls[expert] = InterruptedCall(self[expert])
            return calls[expert].activate(x)

        def finish(expert: int, activation: Tensor) -> Tensor:
            return calls[expert].finish(activation)

        return by_expert(hidden, indices, weights, len(self), activate, finish, tap)

    def grouped(self) -> Experts:
        """The grouped module with the values of the Linears; copies weights that are no longer views of one tensor."""
        for linear, _, _ in self._views():
            if type(linear) is not nn.Linear:
                kind = type(linear).__name__
                raise ValueError(f"an expert's projection has the type {kind}: merge or remove adapters first")
            if type(linear.weight.data) is not Tensor:
                kind = type(linear.weight.data).__name__
                raise ValueError(f"an expert's weight is a {kind}: quantised experts have no grouped form")
        experts: Experts = self._alive("experts") or copy.copy(self.__dict__["empty"])
        experts.__dict__["_parameters"] = dict(experts._parameters)
        for name in _GROUPED:
            values, parameter = self._values(name), self._alive(name)
            if parameter is None or parameter.dtype != values.dtype or parameter.data_ptr() != values.data_ptr():
                if parameter is None:
                    parameter = nn.Parameter(values, requires_grad=False)
                parameter.data = values
                self.__dict__["alive"][name] = weakref.ref(parameter)
            experts._parameters[name] = parameter
        self._view_again(experts)
        self.__dict__["alive"]["experts"] = weakref.ref(experts)
        return experts

    def fuse(self) -> Experts:
        """`grouped` with gradients; a grouped parameter requires a gradient if that of any of its Linears does."""
        experts = self.grouped()
        parameters = {name: getattr(experts, name) for name in _GROUPED}
        for parameter in parameters.values():
            parameter.grad = None
            parameter.requires_grad_(False)
        for linear, name, view in self._views():
            parameter = parameters[name]
            parameter.requires_grad_(parameter.requires_grad or linear.weight.requires_grad)
            if linear.weight.grad is not None:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                view(parameter.grad).copy_(linear.weight.grad)
        experts.__dict__["backend_choices"] = self.__dict__["backend_choices"]
        return experts.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """.to(), .cuda(), .float(): applied to the grouped values, of which the Linears become views again."""
        whole = {name: values for name in _GROUPED if (values := self._one_tensor(name)) is not None}
        applied = {name: fn(values) for name, values in whole.items()}
        super()._apply(fn, recurse)
        for linear, name, view in self._views():
            if name in applied:
                linear.weight.data = view(applied[name])
        for name, values in applied.items():
            parameter = self._alive(name)
            if parameter is not None:
                parameter.data = values
        return self

    def _alive(self, name: str) -> Any:
        reference = self.__dict__["alive"].get(name)
        return None if reference is None else reference()

    def _values(self, name: str) -> Tensor:
        """The grouped values: the tensor of which the Linears' weights are views, or a new one with copies of them. ValueError
        where a Linear has another shape than its experts'."""
        whole = self._one_tensor(name)
        if whole is not None:
            return whole
        first, shape = next(linear.weight for linear, of, _ in self._views() if of == name), self.__dict__["shapes"][name]
        whole = torch.empty(shape, dtype=first.dtype, device=first.device)
        for linear, of, view in self._views():
            if of != name:
                continue
            part, weight = view(whole), linear.weight.detach()
            if weight.shape != part.shape:
                raise ValueError(
                    f"an expert's weight is {list(weight.shape)}, {name} {list(shape)} takes {list(part.shape)}: give every "
                    "expert's Linear its shape back"
                )
            part.copy_(weight)
        return whole

    def _one_tensor(self, name: str) -> Tensor | None:
        """The tensor of which all weights of `name` are the views, or None: a Linear or its weight was replaced."""
        weights: list[tuple[Any, Any]] = [
            (getattr(linear, "weight", None), view) for linear, of, view in self._views() if of == name
        ]
        plain = all(type(weight) is nn.Parameter and not weight.is_meta for weight, _ in weights)
        if not plain:
            return None
        first: Any = weights[0][0]
        shape = self.__dict__["shapes"][name]
        stride = (shape[1] * shape[2], shape[2], 1)
        storage = first.untyped_storage()
        last = first.storage_offset() + shape[0] * stride[0]
        if last * first.element_size() > storage.nbytes():
            return None
        whole = first.detach().as_strided(shape, stride)
        views = ((weight.detach(), view(whole)) for weight, view in weights)
        same = all(
            own.data_ptr() == of.data_ptr() and own.dtype == of.dtype and own.shape == of.shape and own.stride() == of.stride()
            and own.untyped_storage().data_ptr() == storage.data_ptr()
            for own, of in views
        )  # fmt: skip
        return whole if same else None

    def _view_again(self, experts: Experts) -> None:
        """Makes the Linears' weights views of the grouped parameters, where they are not."""
        for linear, name, view in self._views():
            values = view(getattr(experts, name).detach())
            if linear.weight.data_ptr() != values.data_ptr():
                linear.weight.data = values

    def _views(self) -> Iterator[tuple[Any, str, Callable[[Tensor], Tensor]]]:
        """(Linear, name of the grouped parameter, function from that parameter to the view that is the Linear's weight)."""
        inner = self.__dict__["shapes"]["down_proj"][-1]
        for number, expert in enumerate(self):
            yield expert.gate_proj, "gate_up_proj", lambda grouped, e=number: grouped[e, :inner]
            yield expert.up_proj, "gate_up_proj", lambda grouped, e=number: grouped[e, inner:]
            yield expert.down_proj, "down_proj", lambda grouped, e=number: grouped[e]


def _without_weights(experts: Experts) -> Experts:
    """A shallow copy of the module without its grouped parameters."""
    empty = copy.copy(experts)
    empty.__dict__["_parameters"] = dict.fromkeys(experts._parameters)
    return empty


def _unchanged(expert: int, x: Tensor) -> Tensor:
    return x
