"""The inverse of I + a for a strictly lower triangular a, by blocks and by substitution, at keys of all correlations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwen35moe.ops.cpu.triangular import by_blocks, by_substitution
from tests.support.peer import assert_close

METHODS = {"blocks": by_blocks, "substitution": by_substitution}


def system(size: int, correlation: float, beta: float = 0.95) -> Tensor:
    """a_ij = beta k_i . k_j below the diagonal, for unit keys of the given mean correlation: [3, 2, size, size]."""
    rng = torch.Generator().manual_seed(size)
    common = torch.randn(3, 2, 1, 32, generator=rng, dtype=torch.float64)
    independent = torch.randn(3, 2, size, 32, generator=rng, dtype=torch.float64)
    keys = torch.nn.functional.normalize(correlation**0.5 * common + (1 - correlation) ** 0.5 * independent, dim=-1)
    return (beta * keys @ keys.mT).tril(-1)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("size", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("inverse", METHODS.values(), ids=METHODS)
def test_against_float64(inverse, size, correlation):
    exact = system(size, correlation)
    eye = torch.eye(size, dtype=torch.float64)
    assert_close(inverse(exact) @ (eye + exact), eye.expand_as(exact), 1e-11)
    # 32 float32 epsilons, a fifth of the bound of the delta rule: the powers inside a block of 8 cancel by as much.
    assert_close(inverse(exact.float()), inverse(exact), 32 * torch.finfo(torch.float32).eps)
    assert torch.equal(inverse(exact).triu(), eye.expand_as(exact))


def test_gradient():
    raw = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: by_substitution(a.tril(-1)), raw)
    assert torch.autograd.gradgradcheck(lambda a: by_substitution(a.tril(-1)), raw)


@pytest.mark.parametrize("size", [4, 12, 24, 48])
def test_other_sizes_by_blocks_are_errors(size):
    with pytest.raises(ValueError, match=str(size)):
        by_blocks(torch.zeros(1, size, size))
