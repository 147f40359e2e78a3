"""Initial values: every module draws its own parameters when it is made, and again in `reset_parameters`.

    matrices                normal(0, initializer_range)
    biases, RMSNorm         zero (an RMSNorm multiplies by 1 + weight)
    LayerNorm, gated norm   one
    short convolution       uniform(-W^-0.5, W^-0.5)
    A                       uniform(1, 16)
    softplus(dt_bias)       log-uniform(1e-3, 0.1): states decay over tens to thousands of tokens (Gu & Dao 2023)

A constructor calls `initialise` on itself, which draws its own parameters and torch's layers directly inside it: the other
modules inside have drawn theirs. `PretrainedModel.init_weights` draws a whole model from a seed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

GATES = ("ordinary", "transformers")


class Draws:
    """A source of random numbers.

    generator: on the CPU; values then depend on its seed and the shapes only, not on dtype, device or torch's defaults.
        None: torch's global generator of the parameter's device.
    gates: "ordinary", or "transformers" for A in 0.01..16 with dt_bias 1: a median decay of e^-9.7 per token.
    """

    def __init__(self, generator: torch.Generator | None = None, gates: str = "ordinary") -> None:
        if gates not in GATES:
            raise ValueError(f"gates={gates!r} is neither 'ordinary' nor 'transformers'")
        self.generator, self.gates = generator, gates

    def normal(self, parameter: Tensor, std: float) -> None:
        """Fills a parameter with normal(0, std)."""
        if self.generator is None:
            parameter.normal_(0, std)
        else:
            parameter.copy_(self._fresh(parameter).normal_(0, std, generator=self.generator))

    def uniform(self, parameter: Tensor, low: float, high: float) -> Tensor:
        """Numbers in float32 from uniform(low, high), for a parameter to copy."""
        return self._fresh(parameter).uniform_(low, high, generator=self.generator)

    def _fresh(self, parameter: Tensor) -> Tensor:
        device = parameter.device if self.generator is None else "cpu"
        return torch.empty(parameter.shape, dtype=torch.float32, device=device)


class Initialised(nn.Module):
    """A module that initialises its parameters. initializer_range: the standard deviation of its matrices."""

    initializer_range: float = 0.02

    def draw(self, draws: Draws, std: float) -> None:
        """Fills the parameters of this module itself. A subclass with more parameters extends it."""

    def reset_parameters(self) -> None:
        """Draws all parameters of this module again, from torch's global generator (torch.manual_seed)."""
        with torch.no_grad():
            _draw_all(self, Draws(), self.initializer_range)


@torch.no_grad()
def initialise(module: Initialised, std: float) -> None:
    """The end of a constructor: draws the module's own parameters and those of torch's layers directly inside it."""
    module.__dict__["initializer_range"] = std
    draws = Draws()
    for part in (module, *(child for child in module.children() if not isinstance(child, Initialised))):
        draw_module(part, draws, std)


def _draw_all(module: nn.Module, draws: Draws, std: float) -> None:
    std = module.initializer_range if isinstance(module, Initialised) else std
    draw_module(module, draws, std)
    for child in module.children():
        _draw_all(child, draws, std)


def draw_module(module: nn.Module, draws: Draws, std: float) -> None:
    """Fills the parameters of one module of this library, or of one of torch's Linear, Embedding, LayerNorm; of no other.
    Nothing is drawn on the meta device, where even zero_() imports sympy (1.8 s)."""
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return
    if isinstance(module, nn.Linear | nn.Embedding):
        draws.normal(module.weight, std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.zero_()
    elif isinstance(module, nn.LayerNorm):
        module.weight.fill_(1)
        module.bias.zero_()
    elif isinstance(module, Initialised):
        module.draw(draws, std)


def resets_itself(module: nn.Module) -> Any:
    """Whether the class of a module, of neither this library nor torch, defines how its parameters are drawn."""
    method = getattr(type(module), "reset_parameters", None)
    return callable(method) and method.__module__.partition(".")[0] not in ("torch", "qwen35moe")


def leave_inference_mode(model: nn.Module) -> None:
    """The end of a model's constructor: parameters made under torch.inference_mode become ordinary ones, which train."""
    if not torch.is_inference_mode_enabled():
        return
    ordinary: dict[int, nn.Parameter] = {}
    with torch.inference_mode(False), torch.no_grad():
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_inference():
                    if id(parameter) not in ordinary:
                        copied = torch.empty_like(parameter).copy_(parameter)
                        ordinary[id(parameter)] = nn.Parameter(copied, requires_grad=parameter.requires_grad)
                    module._parameters[name] = ordinary[id(parameter)]
