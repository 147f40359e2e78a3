"""The measured scenarios, their inputs, and the implementations that one scenario compares."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

GATES = ("ordinary", "transformers")
MODES = ("forward", "train")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Sizes:
    """A Gated DeltaNet layer's sizes: those of Qwen3.5-35B-A3B, or smaller ones for a test."""

    hidden: int = 2048
    groups: int = 16
    heads: int = 32
    key: int = 128
    value: int = 128
    taps: int = 4

    @property
    def channels(self) -> int:
        return 2 * self.groups * self.key + self.heads * self.value


FULL_SIZE = Sizes()


@dataclass(frozen=True)
class Scenario:
    """operation: rule, convolution, layer, step (a cached token through `layers` layers) or fused_step (the operation
    delta_net_step alone). mode: forward, or train for forward and backward."""

    operation: str
    tokens: int
    gates: str = "ordinary"
    mode: str = "forward"
    batch: int = 1
    dtype: str = "bf16"
    layers: int = 1

    @property
    def id(self) -> str:
        """Stable: reports of different days and machines are compared by it."""
        sizes = [f"B{self.batch}"] * (self.batch > 1) + [f"T{self.tokens}"] + [f"L{self.layers}"] * (self.layers > 1)
        return "/".join([self.operation, *sizes, self.gates, self.dtype, self.mode])


Answer = dict[str, Tensor]


@dataclass
class Implementation:
    """forward returns named outputs. leaves: the inputs and weights whose gradients belong to the answer in mode train."""

    forward: Callable[[], Answer]
    leaves: Mapping[str, Tensor] = field(default_factory=dict)

    def answer(self, mode: str, cotangents: Mapping[str, Tensor] | None = None) -> Answer:
        """Outputs, and in mode train the gradients d_name of the leaves for these cotangents (random ones if None)."""
        if mode == "forward":
            with torch.inference_mode():
                return self.forward()
        outputs = self.forward()
        roots = {name: out for name, out in outputs.items() if out.requires_grad}
        weights = cotangents or drawn_cotangents(roots)
        grads = torch.autograd.grad(
            list(roots.values()), list(self.leaves.values()), [weights[name].to(out) for name, out in roots.items()]
        )
        return outputs | {f"d_{name}": grad for name, grad in zip(self.leaves, grads, strict=True)}


@dataclass
class Comparison:
    """The implementations of one scenario, and the truth in float64.

    view: the part of an answer that the truth covers. auto: the implementation that the library chooses. moved: the least
    number of bytes to read and write.
    """

    implementations: dict[str, Implementation]
    truth: Callable[[], Answer]
    baseline: str
    auto: str
    inputs: Sequence[Tensor]
    cotangents: Mapping[str, Tensor] | None = None
    view: Callable[[Answer], Answer] = lambda answer: answer
    weights: Sequence[Tensor] = ()
    refused: dict[str, str] = field(default_factory=dict)
    moved: int = 0


def draw_gates(gates: str, batch: int, tokens: int, heads: int, generator: torch.Generator) -> Tensor:
    """decay [B, T, H] float32, as a layer computes it from inputs of unit size: -A softplus(a + dt_bias), std(a) = 0.9.

    ordinary: A in 1 ... 16, dt_bias the inverse softplus of log-uniform 1e-3 ... 0.1; transformers: A in 0.01 ... 16 and
    dt_bias 1, that library's init.
    """
    uniform = torch.rand(heads, generator=generator)
    noise = 0.9 * torch.randn(batch, tokens, heads, generator=generator)
    if gates == "transformers":
        return -(0.01 + 15.99 * uniform) * F.softplus(noise + 1)
    step = torch.exp(math.log(1e-3) + math.log(100.0) * torch.rand(heads, generator=generator))
    return -(1 + 15 * uniform) * F.softplus(noise + step.expm1().log())


def drawn_cotangents(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A fixed random cotangent for every output."""
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(out.shape, generator=generator).to(out) for name, out in outputs.items()}
