"""RMSNorm, gated RMSNorm and the l2 norm: formulas in float64, gradients, dtypes, and transformers' modules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qwen35moe import ops
from qwen35moe.ops.cpu.norm import gated_rms_norm_cpu
from qwen35moe.ops.norm import l2_norm
from tests.support.peer import assert_close, randn

gated_rms_norm = ops.gated_rms_norm.definition
rms_norm = ops.rms_norm.definition

EPS = 1e-6


def by_hand(x: list[float]) -> list[float]:
    root = math.sqrt(sum(value * value for value in x) / len(x) + EPS)
    return [value / root for value in x]


def test_rms_norm_by_formula():
    x, weight = randn(3, 7), 0.3 * randn(7, seed=1)
    expected = torch.tensor([by_hand(row.tolist()) for row in x], dtype=torch.float64) * (1 + weight)
    assert_close(rms_norm(x, weight, eps=EPS), expected, 1e-14)


def test_gated_rms_norm_by_formula_with_the_gate_after_the_norm():
    x, gate, weight = randn(3, 7), randn(3, 7, seed=1), 1 + 0.3 * randn(7, seed=2)
    expected = torch.tensor([by_hand(row.tolist()) for row in x], dtype=torch.float64)
    expected = expected * weight * gate / (1 + torch.exp(-gate))
    assert_close(gated_rms_norm(x, gate, weight, eps=EPS), expected, 1e-14)


def test_l2_norm_by_formula():
    x = randn(2, 3, 5)
    assert_close(l2_norm(x), x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt(), 1e-14)
    assert_close(l2_norm(x, eps=0.25), x / (x.pow(2).sum(-1, keepdim=True) + 0.25).sqrt(), 1e-14)


def test_gradcheck():
    def leaf(*shape: int, seed: int) -> Tensor:
        return randn(*shape, seed=seed).requires_grad_()

    x, weight, gate = leaf(2, 3, 5, seed=0), leaf(5, seed=1), leaf(2, 3, 5, seed=2)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, eps=EPS), (x, weight))
    for form in (gated_rms_norm, gated_rms_norm_cpu):
        assert torch.autograd.gradcheck(lambda x, g, w, form=form: form(x, g, w, eps=EPS), (x, gate, weight))
    assert torch.autograd.gradcheck(l2_norm, (x,))


def test_the_gradients_in_blocks_equal_those_of_the_definition(monkeypatch):
    monkeypatch.setattr("qwen35moe.ops.cpu.norm._BLOCK", 3 * 24)  # blocks of three rows
    leaves = [randn(*shape, seed=seed).requires_grad_() for seed, shape in enumerate([(2, 7, 24), (2, 7, 24), (24,)])]
    actual, expected = (torch.autograd.grad(form(*leaves, eps=EPS), leaves, randn(2, 7, 24, seed=4))
                       for form in (gated_rms_norm_cpu, gated_rms_norm))
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, 1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_output_has_the_dtype_of_the_input_and_is_rounded_once(dtype):
    """Arithmetic is float32 at least: the bfloat16 result is the rounded float32 result of the same inputs."""
    x, gate, weight = randn(4, 33, dtype=dtype), randn(4, 33, seed=1, dtype=dtype), randn(33, seed=2, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for op, inputs in ((rms_norm, (x, weight)), (gated_rms_norm, (x, gate, weight))):
        out = op(*inputs, eps=EPS)
        assert out.dtype == dtype
        torch.testing.assert_close(out, op(*(t.to(wide) for t in inputs), eps=EPS).to(dtype), rtol=0, atol=0)


def test_a_float32_weight_does_not_widen_a_bfloat16_activation():
    x, gate, weight = randn(2, 9).bfloat16(), randn(2, 9, seed=1).bfloat16(), randn(9, seed=2).float()
    assert rms_norm(x, weight, eps=EPS).dtype == torch.bfloat16
    assert gated_rms_norm(x, gate, weight, eps=EPS).dtype == torch.bfloat16


def test_zero_rows_stay_zero_with_finite_gradients():
    for op in (lambda x: rms_norm(x, torch.zeros(5), eps=EPS), l2_norm):
        x = torch.zeros(2, 5, requires_grad=True)
        y = op(x)
        y.sum().backward()
        assert (y == 0).all() and x.grad is not None and torch.isfinite(x.grad).all()


def test_a_row_does_not_depend_on_other_rows():
    x, weight = randn(6, 31, dtype=torch.float32), randn(31, seed=1, dtype=torch.float32)
    whole = rms_norm(x, weight, eps=EPS)
    for r in range(6):
        assert torch.equal(rms_norm(x[r : r + 1], weight, eps=EPS), whole[r : r + 1])


def test_against_transformers():
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeRMSNorm, Qwen3_5MoeRMSNormGated, l2norm

    x, gate = randn(3, 4, 13, dtype=torch.float32), randn(3, 4, 13, seed=1, dtype=torch.float32)
    weight = randn(13, seed=2, dtype=torch.float32)
    plain, gated = Qwen3_5MoeRMSNorm(13, eps=1e-5), Qwen3_5MoeRMSNormGated(13, eps=1e-5)
    plain.weight.data, gated.weight.data = weight, weight
    assert_close(rms_norm(x, weight, eps=1e-5), plain(x), 1e-6)
    assert_close(gated_rms_norm(x, gate, weight, eps=1e-5), gated(x, gate), 1e-6)
    assert_close(l2_norm(x), l2norm(x), 1e-6)
