"""(I + A)^-1: both ways against float64, for the keys at which a product over the whole chunk loses every digit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwen35moe.ops.cpu.triangular import by_blocks, by_substitution
from tests.support.peer import assert_close

WAYS = {"blocks": by_blocks, "substitution": by_substitution}


def system(size: int, correlation: float, beta: float = 0.95) -> Tensor:
    """beta K K^T below the diagonal, unit keys of the given mean correlation: [3, 2, size, size]."""
    rng = torch.Generator().manual_seed(size)
    common = torch.randn(3, 2, 1, 32, generator=rng, dtype=torch.float64)
    own = torch.randn(3, 2, size, 32, generator=rng, dtype=torch.float64)
    keys = torch.nn.functional.normalize(correlation**0.5 * common + (1 - correlation) ** 0.5 * own, dim=-1)
    return (beta * keys @ keys.mT).tril(-1)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("size", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_against_float64(way, size, correlation):
    exact = system(size, correlation)
    eye = torch.eye(size, dtype=torch.float64)
    assert_close(way(exact) @ (eye + exact), eye.expand_as(exact), 1e-11)
    # 32 units of float32's last place, a fifth of the rule's own bound: the powers inside a block of 8 cancel by as much.
    assert_close(way(exact.float()), way(exact), 32 * torch.finfo(torch.float32).eps)
    assert torch.equal(way(exact).triu(), eye.expand_as(exact))


def test_gradient():
    raw = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: by_substitution(a.tril(-1)), raw)
    assert torch.autograd.gradgradcheck(lambda a: by_substitution(a.tril(-1)), raw)


@pytest.mark.parametrize("size", [4, 12, 24, 48])
def test_other_sizes_are_refused_by_blocks(size):
    with pytest.raises(ValueError, match=str(size)):
        by_blocks(torch.zeros(1, size, size))
