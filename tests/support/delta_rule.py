"""Inputs of the gated delta rule at gates and keys of every kind, and the bounds of its numerical contract.

The reference is the recurrence in float64: a sum of T rank-one updates, without divisions and without differences of large
terms. Relative bounds in float32: FP32 for outputs, states and gradients; HARD_GATE for the gradient of a decay beyond -20,
which is itself of size e^-20.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen35moe import ops
from tests.support.peer import generator

recurrent_gated_delta_rule = ops.gated_delta_rule.definition

CUTS = [1, 3, 4, 63, 64, 65, 129]
B, G, H, K, V = 2, 3, 6, 5, 7
FP32, HARD_GATE, EXACT = 2e-5, 1e-4, 1e-12


def log_uniform(low: float, high: float, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    exponent = torch.rand(shape, generator=rng, dtype=torch.float64) * (math.log(high) - math.log(low)) + math.log(low)
    return -exponent.exp()


def _hard_then_soft(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    decay = log_uniform(1e-4, 1e-2, shape, rng)
    decay[:, : shape[1] // 2] = -80.0
    decay[:, ::17] = -25.0
    return decay


GATES: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    **{str(level): (lambda shape, _rng, level=level: torch.full(shape, level, dtype=torch.float64))
       for level in (-1e-4, -1e-2, -1.0, -9.7, -19.0, -21.0, -28.0, -80.0)},
    "none": lambda shape, _rng: torch.zeros(shape, dtype=torch.float64),
    "ordinary": lambda shape, rng: log_uniform(1e-3, 1.6, shape, rng),
    "any": lambda shape, rng: log_uniform(1e-4, 80.0, shape, rng),
    "hard then soft": _hard_then_soft,
    "alternating": lambda shape, _rng: torch.where(torch.arange(shape[1])[None, :, None] % 2 == 0, -80.0, -1e-4)
    .double().expand(shape).clone(),
}
BETAS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "any": lambda shape, rng: torch.rand(shape, generator=rng, dtype=torch.float64),
    "0": lambda shape, _rng: torch.zeros(shape, dtype=torch.float64),
    "1": lambda shape, _rng: torch.ones(shape, dtype=torch.float64),
}


def _correlated(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    common = torch.randn((shape[0], 1, *shape[2:]), generator=rng, dtype=torch.float64)
    return 0.9**0.5 * common + 0.1**0.5 * torch.randn(shape, generator=rng, dtype=torch.float64)


KEYS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "any": lambda shape, rng: torch.randn(shape, generator=rng, dtype=torch.float64),
    "zero": lambda shape, _rng: torch.zeros(shape, dtype=torch.float64),
    "equal": lambda shape, rng: torch.randn((shape[0], 1, *shape[2:]), generator=rng).double().expand(shape).clone(),
    "correlated": _correlated,
}


def inputs(
    length: int, *, batch: int = B, gates: str = "ordinary", betas: str = "any", keys: str = "any", seed: int = 0,
    state: bool = True, dtype: torch.dtype = torch.float32, heads: tuple[int, int, int, int] = (G, H, K, V),
) -> dict[str, Tensor]:
    """query, key, value, decay, beta (and state), rounded to float32 before they are cast to dtype."""
    rng = generator(seed)
    groups, value_heads, key_width, value_width = heads
    values = {
        "query": torch.randn((batch, length, groups, key_width), generator=rng, dtype=torch.float64),
        "key": KEYS[keys]((batch, length, groups, key_width), rng),
        "value": torch.randn((batch, length, value_heads, value_width), generator=rng, dtype=torch.float64),
        "decay": GATES[gates]((batch, length, value_heads), rng),
        "beta": BETAS[betas]((batch, length, value_heads), rng),
    }
    if state:
        values["state"] = torch.randn((batch, value_heads, key_width, value_width), generator=rng, dtype=torch.float64)
    return {name: tensor.float().to(dtype) for name, tensor in values.items()}


def call(form: Callable[..., Any], values: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    named = {name: tensor for name, tensor in values.items() if name not in ("query", "key", "value")}
    return form(values["query"], values["key"], values["value"], **named, **options)


def with_gradients(form: Callable[..., Any], values: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Output, final state and the gradient of every input under random cotangents of both."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in values.items()}
    out, state = call(form, leaves, **options)
    rng = generator(99)
    loss = (out * torch.randn(out.shape, generator=rng).to(out)).sum()
    loss = loss + (state * torch.randn(state.shape, generator=rng).to(state)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out.detach(), "final": state.detach()} | {
        f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def doubles(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in values.items()}


def assert_within_bounds(actual: dict[str, Tensor], reference: dict[str, Tensor], gate: float, floor: float = 1e-13) -> None:
    """FP32 and HARD_GATE, relative to the largest value of the reference. gate: the smallest decay of the inputs.

    A reference smaller than e^-30 throughout (all gates at -80) counts as zero: errors are relative to `floor` at least.
    """
    errors = {}
    for name, expected in reference.items():
        bound = HARD_GATE if name == "d_decay" and gate <= -20 else FP32
        assert torch.isfinite(actual[name]).all(), f"{name} is not finite"
        error = (actual[name].double() - expected).abs().max().item() / max(expected.abs().max().item(), floor)
        if error > bound:
            errors[name] = f"{error:.1e} > {bound:.0e}"
    assert not errors, f"beyond the bound: {errors}"


def count_subnormals(tensor: Tensor) -> int:
    size = tensor.detach().abs()
    return int(((size > 0) & (size < torch.finfo(torch.float32).tiny)).sum())
