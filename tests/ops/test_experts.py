"""Router and experts: by hand, and the forms against each other at loads from balanced to one expert for all tokens.

Random cases, the memory of the backward and the choice of a form are in test_experts_forms.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe import ops
from qwen35moe.ops.cpu.experts import gathered_experts
from qwen35moe.ops.cpu.sorted_experts import sorted_experts
from qwen35moe.ops.experts import chosen_weights, tapped_experts
from tests.support.peer import assert_close, generator, randn

loop_experts = ops.experts.definition
router = ops.router.definition

FORMS = {"loop": loop_experts, "sorted": sorted_experts, "gathered": gathered_experts, "tapped": tapped_experts}
D, E, FF, N = 12, 6, 5, 17


def problem(tokens: int = N, top_k: int = 2, load: str = "random", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """hidden, gate_up, down, indices, weights. `load`: the distribution of the tokens over the experts."""
    rng = generator(tokens + top_k)
    scores = torch.rand((tokens, E), generator=rng)
    if load == "all to one":
        scores = torch.arange(E, 0, -1.0).expand(tokens, E)
    elif load == "empty experts":
        scores[:, 1::2] -= 5
    indices = scores.topk(top_k, dim=-1).indices
    weights = torch.rand((tokens, top_k), generator=rng, dtype=torch.float64)
    weights = weights / weights.sum(-1, keepdim=True)
    hidden, gate_up, down = randn(tokens, D), randn(E, 2 * FF, D, seed=1) * D**-0.5, randn(E, D, FF, seed=2) * FF**-0.5
    return [hidden.to(dtype), gate_up.to(dtype), down.to(dtype), indices, weights.to(dtype)]


# ---------------------------------------------------------------------------------------------------- router


@pytest.mark.parametrize("top_k", [1, 3, E])
def test_the_router_by_hand(top_k):
    hidden, weight = randn(N, D), randn(E, D, seed=1)
    logits, weights, indices = router(hidden, weight, top_k=top_k)
    assert_close(logits, hidden @ weight.T, 1e-14)
    probabilities = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    for n in range(N):
        order = sorted(range(E), key=lambda e: -probabilities[n, e].item())[:top_k]
        assert indices[n].tolist() == order
        assert_close(weights[n], probabilities[n, order] / probabilities[n, order].sum(), 1e-14)
    assert_close(weights.sum(-1), torch.ones(N, dtype=torch.float64), 1e-14)


def test_negative_equal_and_nearly_equal_logits():
    """All logits of this model are often negative; equal ones must still choose k different experts."""
    weight = torch.eye(E, D)
    for logits in (
        torch.linspace(-90, -50, E),
        torch.full((E,), -7.0),
        torch.tensor([0.0, 1e-7, 0.0, -1e-7, 2e-7, 0.0]) - 20,
        torch.linspace(-3000, 3000, E),
    ):
        hidden = F.pad(logits, (0, D - E))[None]
        _, weights, indices = router(hidden, weight, top_k=3)
        assert torch.isfinite(weights).all() and weights.sum().item() == pytest.approx(1)
        assert len(set(indices[0].tolist())) == 3
        assert set(logits[indices[0]].tolist()) == set(logits.topk(3).values.tolist())


def test_router_gradcheck_and_dtypes():
    hidden, weight = randn(4, 3).requires_grad_(), randn(5, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: router(h, w, top_k=2)[:2], (hidden, weight))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits, weights, indices = router(randn(N, D, dtype=dtype), randn(E, D, seed=1, dtype=dtype), top_k=2)
        assert (logits.dtype, weights.dtype, indices.dtype) == (dtype, dtype, torch.int64)


def test_the_weights_of_given_experts():
    logits = randn(N, E)
    indices = torch.rand((N, E), generator=generator(3)).topk(2, dim=-1).indices
    expected = torch.softmax(logits.gather(1, indices), dim=-1)
    assert_close(chosen_weights(logits, indices), expected, 1e-14)
    logits, weights, indices = router(randn(N, D), randn(E, D, seed=1), top_k=3)
    assert torch.equal(chosen_weights(logits, indices), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_router_equals_that_of_transformers_bit_for_bit(dtype):
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTopKRouter

    config: Any = type("Config", (), {"num_experts_per_tok": 3, "num_experts": E, "hidden_size": D})()
    module, weight, hidden = Qwen3_5MoeTopKRouter(config), randn(E, D, seed=1, dtype=dtype), randn(N, D, dtype=dtype)
    module.weight.data = weight
    for actual, expected in zip(router(hidden, weight, top_k=3), module(hidden), strict=True):
        assert torch.equal(actual, expected)


# ---------------------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_sum_by_hand(form):
    hidden, gate_up, down, indices, weights = problem(dtype=torch.float64)
    out = form(hidden, gate_up, down, indices, weights)
    for n in range(N):
        expected = torch.zeros(D, dtype=torch.float64)
        for j, expert in enumerate(indices[n].tolist()):
            gate, up = gate_up[expert, :FF] @ hidden[n], gate_up[expert, FF:] @ hidden[n]
            expected += weights[n, j] * (down[expert] @ (gate * torch.sigmoid(gate) * up))
        assert_close(out[n], expected, 1e-13)


def weight_gradient_scale(values: Any, cotangent: Tensor) -> float:
    """The largest |dy| |y_j|: the gradient of w_j is their product summed over D, whose terms may cancel."""
    hidden, gate_up, down, indices, _ = (x.detach().double() if x.is_floating_point() else x for x in values)
    assignments, top_k = indices.reshape(-1, 1), indices.shape[1]
    ones = torch.ones(assignments.shape, dtype=torch.float64)
    out = loop_experts(hidden.repeat_interleave(top_k, dim=0), gate_up, down, assignments, ones)
    sizes = cotangent.double().repeat_interleave(top_k, dim=0).norm(dim=-1) * out.norm(dim=-1)
    return sizes.max().item() if sizes.numel() else 1.0


@pytest.mark.parametrize("tokens", [1, 3, 4, 63, 64, 65, 129])
@pytest.mark.parametrize("top_k,load", [(1, "random"), (2, "random"), (E, "random"), (3, "all to one"),
                                        (2, "empty experts")])
def test_the_forms_agree_on_values_and_gradients(tokens, top_k, load):
    results, cotangent = [], randn(tokens, D, seed=4).float()
    for form in FORMS.values():
        hidden, gate_up, down, indices, weights = problem(tokens, top_k, load)
        leaves = [tensor.requires_grad_() for tensor in (hidden, gate_up, down, weights)]
        out = form(hidden, gate_up, down, indices, weights)
        results.append([out, *torch.autograd.grad(out, leaves, cotangent)])
    size = weight_gradient_scale(problem(tokens, top_k, load), cotangent)
    for result in results[1:]:
        for loop, other in zip(results[0][:-1], result[:-1], strict=True):
            assert_close(other, loop, 1e-6)
        assert (result[-1] - results[0][-1]).abs().max() <= 1e-6 * size


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradcheck(form):
    hidden, gate_up, down, weights = randn(3, 4), randn(3, 4, 4, seed=1), randn(3, 4, 2, seed=2), randn(3, 2, seed=3)
    indices = torch.tensor([[0, 2], [2, 0], [0, 1]])
    leaves = [tensor.requires_grad_() for tensor in (hidden, gate_up, down, weights)]
    assert torch.autograd.gradcheck(lambda h, g, d, w: form(h, g, d, indices, w), leaves)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_order_of_experts_does_not_matter(form):
    """Within the bound, not bit for bit: the outputs of the experts of a token are added in the order of the experts."""
    hidden, gate_up, down, indices, weights = problem(top_k=3)
    order = torch.randperm(E, generator=generator(5))
    new_index = torch.empty_like(order).scatter(0, order, torch.arange(E))
    permuted = form(hidden, gate_up[order], down[order], new_index[indices], weights)
    assert_close(permuted, form(hidden, gate_up, down, indices, weights), 1e-6)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_order_of_choices_and_of_tokens_does_not_matter(form):
    hidden, gate_up, down, indices, weights = problem(top_k=3)
    expected = form(hidden, gate_up, down, indices, weights)
    assert_close(form(hidden, gate_up, down, indices.flip(1), weights.flip(1)), expected, 1e-6)
    assert_close(form(hidden.flip(0), gate_up, down, indices.flip(0), weights.flip(0)).flip(0), expected, 1e-6)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_an_expert_without_tokens_is_not_read_and_has_no_gradient(form):
    hidden, gate_up, down, indices, weights = problem(load="empty experts")
    gate_up[1], down[3] = float("nan"), float("nan")
    gate_up.requires_grad_()
    out = form(hidden, gate_up, down, indices, weights)
    out.sum().backward()
    assert torch.isfinite(out).all() and gate_up.grad is not None
    assert (gate_up.grad[1::2] == 0).all() and (gate_up.grad[0::2] != 0).any()


@pytest.mark.parametrize("tokens", [1, 5, 70, 200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_output_keeps_the_dtype(form, dtype, tokens):
    values = problem(tokens, dtype=dtype)
    out = form(*values)
    exact = loop_experts(*(x.double() if x.is_floating_point() else x for x in values))
    assert out.dtype == dtype
    assert_close(out, exact, {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype])


def test_against_transformers():
    from transformers import Qwen3_5MoeTextConfig
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeExperts

    config = Qwen3_5MoeTextConfig(num_experts=E, hidden_size=D, moe_intermediate_size=FF)
    config._experts_implementation = "eager"
    hidden, gate_up, down, indices, weights = problem(70, 3)
    module = Qwen3_5MoeExperts(config)
    module.gate_up_proj.data, module.down_proj.data = gate_up, down
    for form in FORMS.values():
        assert_close(form(hidden, gate_up, down, indices, weights), module(hidden, indices, weights), 1e-6)
