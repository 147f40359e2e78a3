"""The parameters of a model, each once, with all its names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qwen35moe.modules.unfused import UnfusedExperts

from . import names


def fp32_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the module's own parameters that stay float32 in a model of any dtype (modules/fp32_parameters.py)."""
    return getattr(module, "fp32_parameters", ())


@dataclass
class ModelParameter:
    """One parameter of a model with all its names (tied weights have several)."""

    tensor: Tensor
    owners: list[tuple[nn.Module, str]]
    names: list[str]  # canonical

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def is_fp32(self) -> bool:
        """Whether the parameter stays at least float32 in a model of any dtype."""
        module, leaf = self.owners[0]
        return leaf in fp32_parameters(module)

    def dtype_in(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of this parameter in a model of dtype `dtype`."""
        return torch.promote_types(torch.float32, dtype) if self.is_fp32 else dtype


def parameters_of(model: nn.Module, every_name: bool = False) -> list[ModelParameter]:
    """The parameters of a model in the order of its state_dict; tied ones once, with all their names. Unfused experts
    count as the grouped parameters that they are views of. every_name: also the names of a module that is used twice."""
    parameters: dict[int, ModelParameter] = {}
    unfused: tuple[str, ...] = ()
    for prefix, module in model.named_modules(remove_duplicate=not every_name):
        if prefix.startswith(unfused):
            continue
        if isinstance(module, UnfusedExperts):
            unfused, module = (*unfused, f"{prefix}."), module.grouped()
        for leaf, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            parameter = parameters.setdefault(id(tensor), ModelParameter(tensor, [], []))
            parameter.owners.append((module, leaf))
            parameter.names.append(names.canonical(name) or name)
    return list(parameters.values())


def parts_in(parameters: Iterable[ModelParameter]) -> set[str]:
    """The parts that a model has, as `names.part_of` calls them."""
    return {names.part_of(name) for parameter in parameters for name in parameter.names if names.canonical(name)}
