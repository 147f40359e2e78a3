"""A layer's experts as separate modules, for adapters, quantisers and hooks that work on nn.Linear.

The weights of the Linears are views of the grouped parameters: no weight is stored twice, and an optimizer step on one changes
the other. Names are those of transformers' per-expert layout: `experts.7.gate_proj.weight`, `.up_proj.weight`,
`.down_proj.weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen35moe import ops
from qwen35moe.backends import choice_of
from qwen35moe.modules.moe import MLP, Experts
from qwen35moe.ops.experts import Tap, by_expert


class UnfusedExperts(nn.ModuleList):
    """`Experts` as a list of E MLPs whose weights are views of its gate_up_proj [E, 2F, D] and down_proj [E, D, F].

    The forward calls every Linear of every chosen expert once, so that hooks on them run. `grouped` returns the module with the
    grouped parameters, `fuse` the same with their gradients. Both need plain Linears: merge and remove adapters first. The
    number of rows of each expert is read on the host, which is a graph break under torch.compile.
    """

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.__dict__["fused"] = experts  # not a submodule: the Linears have its parameters
        self.__dict__["backend_choices"] = experts.__dict__.get("backend_choices", {})
        count, width, inner = experts.down_proj.shape
        with torch.device("meta"):
            self.extend(MLP(width, inner, experts.initializer_range) for _ in range(count))
        for linear, name, view in self._views():
            linear.weight = nn.Parameter(view(getattr(experts, name).detach()), getattr(experts, name).requires_grad)
            grad = getattr(experts, name).grad
            linear.weight.grad = None if grad is None else view(grad)
        self.train(experts.training)

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor, tap: Tap | None = None) -> Tensor:
        """See `Experts.forward`: hidden [N, D], indices and weights [N, k]; returns [N, D], summed in float32 at least."""
        choice = choice_of(ops.experts.name, self)
        if choice is not None:
            raise ValueError(f"backend={choice!r} cannot run experts: they are unfused; call model.fuse_experts() first")
        if tap is None:  # every expert is called as a module, so that its hooks run
            return by_expert(hidden, indices, weights, len(self), lambda expert, x: self[expert](x), _unchanged)
        return by_expert(hidden, indices, weights, len(self), self._activate, self._project, tap)

    def _activate(self, expert: int, x: Tensor) -> Tensor:
        mlp: Any = self[expert]
        return F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)

    def _project(self, expert: int, x: Tensor) -> Tensor:
        mlp: Any = self[expert]
        return mlp.down_proj(x)

    def grouped(self) -> Experts:
        """The grouped module with the values of the Linears; copies the weights that are no longer its views."""
        experts: Experts = self.__dict__["fused"]
        for linear, name, view in self._views():
            if type(linear) is not nn.Linear:
                kind = type(linear).__name__
                raise ValueError(f"an expert's projection has the type {kind}: merge or remove adapters first")
            parameter = getattr(experts, name)
            if parameter.dtype != linear.weight.dtype or parameter.device != linear.weight.device:
                parameter.data = torch.empty_like(parameter, dtype=linear.weight.dtype, device=linear.weight.device)
            if not self._is_view(linear.weight, name, view):
                view(parameter.detach()).copy_(linear.weight.detach())
        return experts

    def fuse(self) -> Experts:
        """`grouped` with gradients; a grouped parameter requires a gradient if that of any of its Linears does."""
        experts = self.grouped()
        parameters = {name: getattr(experts, name) for name in ("gate_up_proj", "down_proj")}
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
        """.to(), .cuda(), .float(): applied to the grouped parameters, of which the Linears become views again."""
        views = [
            type(linear) is nn.Linear and self._is_view(linear.weight, name, view) for linear, name, view in self._views()
        ]
        super()._apply(fn, recurse)
        self.__dict__["fused"]._apply(fn)
        for (linear, name, view), was_view in zip(self._views(), views, strict=True):
            if was_view:
                linear.weight.data = view(getattr(self.__dict__["fused"], name).detach())
        return self

    def _is_view(self, weight: Tensor, name: str, view: Callable[[Tensor], Tensor]) -> bool:
        return not weight.is_meta and weight.data_ptr() == view(getattr(self.__dict__["fused"], name)).data_ptr()

    def _views(self) -> Iterator[tuple[Any, str, Callable[[Tensor], Tensor]]]:
        """(Linear, name of the grouped parameter, function from that parameter to the view that is the Linear's weight)."""
        inner = self.__dict__["fused"].down_proj.shape[-1]
        for number, expert in enumerate(self):
            yield expert.gate_proj, "gate_up_proj", lambda grouped, e=number: grouped[e, :inner]
            yield expert.up_proj, "gate_up_proj", lambda grouped, e=number: grouped[e, inner:]
            yield expert.down_proj, "down_proj", lambda grouped, e=number: grouped[e]


def _unchanged(expert: int, x: Tensor) -> Tensor:
    return x
