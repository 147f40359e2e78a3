"""The products of the backward of a linear map, dx = dy W and dW = dy^T x, against float64.

`linear`, the experts and the loss use them.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from qwen35moe import backends
from qwen35moe.ops.cpu import products
from qwen35moe.ops.cpu.losses import chunked_linear_cross_entropy
from qwen35moe.ops.cpu.sorted_experts import sorted_experts
from tests.ops.test_experts_forms import draw, output_and_gradients, widened
from tests.support.peer import assert_close, generator

ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of one result


def matrices(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """dy [rows, 11], x [rows, 7], W [11, 7]."""
    rng = generator(rows)
    grad, x, weight = (torch.randn(shape, generator=rng).to(dtype) for shape in ((rows, 11), (rows, 7), (11, 7)))
    return grad, x, weight


@pytest.mark.parametrize("block", [1, 21, 1 << 19])
@pytest.mark.parametrize("rows", [1, 2, 9, 40])
@pytest.mark.parametrize("form", ["torch", "widened", "auto"])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_products_of_a_backward(dtype: torch.dtype, form: str, rows: int, block: int) -> None:
    """At most one rounding to the dtype, for weights in any number of blocks, with and without `out`."""
    grad, x, weight = matrices(rows, dtype)
    wide_grad, wide_x, wide_weight = (value.double() for value in (grad, x, weight))
    with mock.patch.object(products, "_GRADIENT_BLOCK", block), backends.use(linear=form):
        for product, other, expected in (
            (products.input_gradient, weight, wide_grad @ wide_weight), (products.weight_gradient, x, wide_grad.t() @ wide_x)
        ):  # fmt: skip
            result, out = product(grad, other), torch.full(expected.shape, float("nan"), dtype=dtype)
            assert product(grad, other, out) is out and torch.equal(out, result) and result.dtype == dtype
            bound = (2 if form == "widened" else 16) * ROUNDING[dtype]  # torch may sum in half precision on some processors
            assert_close(result, expected, bound)
            assert_close(product(grad.t().contiguous().t(), other), expected, bound)


def test_the_products_without_rows() -> None:
    for dtype in ROUNDING:
        grad, x, weight = matrices(0, dtype)
        for form in ("torch", "widened"):
            with backends.use(linear=form):
                assert products.input_gradient(grad, weight).shape == (0, 7)
                assert torch.equal(products.weight_gradient(grad, x), torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["torch", "widened"])
def test_gradients_of_experts_and_loss_in_half_precision(form: str, dtype: torch.dtype) -> None:
    values = draw("random", 13, dtype)
    with backends.use(linear=form):
        actual = output_and_gradients(sorted_experts, values)
    expected = output_and_gradients(sorted_experts, widened(values))
    for result, truth in zip(actual, expected, strict=True):
        assert_close(result, truth, 4e-2)
    leaves = [x.requires_grad_() for x in matrices(9, dtype)[1:]]
    labels = torch.arange(9)
    with backends.use(linear=form):
        grads = torch.autograd.grad(chunked_linear_cross_entropy(*leaves, labels), leaves)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    for result, truth in zip(grads, torch.autograd.grad(chunked_linear_cross_entropy(*exact, labels), exact), strict=True):
        assert_close(result, truth, 2e-2)
