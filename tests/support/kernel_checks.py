"""Compares one implementation on chosen arguments with the definition in float64: errors of outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qwen35moe import backends
from qwen35moe.backends.verification import Row, compare

# Kernels run compiled on a GPU, otherwise in Triton's interpreter (see conftest).
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Outputs are rounded once. Triton's interpreter truncates to bfloat16 instead of rounding: an error of 2^-7, not 2^-8.
ROUNDED = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 2**-7}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(DEVICE, dtype)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def entry(operation: str, name: str) -> backends.Implementation:
    return next(candidate for candidate in backends.implementations(operation) if candidate.name == name)


def judged(operation: str, name: str, args: tuple, options: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> Row:
    """The errors of the implementation on these arguments; AssertionError if it is unsupported or raises."""

    def cases(*_: Any) -> Any:
        yield args, options

    definition, _ = backends.cases(operation)
    (row,) = compare(operation, [entry(operation, name)], definition, cases, dtype, DEVICE, seed)
    assert row.reason is None and row.failure is None, row.reason or row.failure
    return row


def assert_close(
    operation: str, name: str, args: tuple, options: dict[str, Any], dtype: torch.dtype, *, forward: float,
    backward: float | None = None,
) -> None:  # fmt: skip
    row = judged(operation, name, args, options, dtype)
    assert row.forward <= forward, f"forward {row.forward:.2e}, bound {forward:.2e}"
    if backward is not None:
        assert row.backward <= backward, f"backward {row.backward:.2e}, bound {backward:.2e}"


def refusal(operation: str, name: str, *args: Any, **options: Any) -> str | None:
    return entry(operation, name).refusal(args, options)


def gradients(fn: Callable[..., Any], *leaves: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the sum of squares of all outputs of fn."""
    copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    outputs = fn(*copies)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.autograd.grad(sum(out.float().square().sum() for out in outputs), copies)
