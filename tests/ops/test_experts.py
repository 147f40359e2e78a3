"""Router and experts: by hand, the forms against each other, every load from balanced to all-to-one.

The many random cases, what a form may not do, and the choice between forms are in test_ops_experts_forms.py.
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
from tests.support.peer import assert_close, generator

loop_experts = ops.experts.definition
router = ops.router.definition

FORMS = {"loop": loop_experts, "sorted": sorted_experts, "gathered": gathered_experts, "tapped": tapped_experts}
D, E, FF, N = 12, 6, 5, 17


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def problem(tokens: int = N, top_k: int = 2, load: str = "random", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """hidden, gate_up, down, indices, weights. `load`: how the tokens fall on the experts."""
    rng = generator(tokens + top_k)
    scores = torch.rand((tokens, E), generator=rng)
    if load == "all to one":
        scores = torch.arange(E, 0, -1.0).expand(tokens, E)
    elif load == "empty experts":
        scores[:, 1::2] -= 5
    indices = scores.topk(top_k, dim=-1).indices
    weights = torch.rand((tokens, top_k), generator=rng, dtype=torch.float64)
    weights = weights / weights.sum(-1, keepdim=True)
    hidden, gate_up, down = draw(tokens, D), draw(E, 2 * FF, D, seed=1) * D**-0.5, draw(E, D, FF, seed=2) * FF**-0.5
    return [hidden.to(dtype), gate_up.to(dtype), down.to(dtype), indices, weights.to(dtype)]


# ---------------------------------------------------------------------------------------------------- router


@pytest.mark.parametrize("top_k", [1, 3, E])
def test_the_router_by_hand(top_k):
    hidden, weight = draw(N, D), draw(E, D, seed=1)
    logits, weights, indices = router(hidden, weight, top_k=top_k)
    assert_close(logits, hidden @ weight.T, 1e-14)
    probabilities = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    for n in range(N):
        order = sorted(range(E), key=lambda e: -probabilities[n, e].item())[:top_k]
        assert indices[n].tolist() == order
        assert_close(weights[n], probabilities[n, order] / probabilities[n, order].sum(), 1e-14)
    assert_close(weights.sum(-1), torch.ones(N, dtype=torch.float64), 1e-14)


def test_logits_that_are_all_negative_equal_or_nearly_tied():
    """All-negative logits are normal for this model; equal ones must still choose S different experts."""
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
    hidden, weight = draw(4, 3).requires_grad_(), draw(5, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: router(h, w, top_k=2)[:2], (hidden, weight))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits, weights, indices = router(draw(N, D, dtype=dtype), draw(E, D, seed=1, dtype=dtype), top_k=2)
        assert (logits.dtype, weights.dtype, indices.dtype) == (dtype, dtype, torch.int64)


def test_the_weights_of_experts_chosen_elsewhere():
    logits = draw(N, E)
    indices = torch.rand((N, E), generator=generator(3)).topk(2, dim=-1).indices
    expected = torch.softmax(logits.gather(1, indices), dim=-1)
    assert_close(chosen_weights(logits, indices), expected, 1e-14)
    own = router(draw(N, D), draw(E, D, seed=1), top_k=3)
    assert torch.equal(chosen_weights(own[0], own[2]), own[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_router_is_that_of_transformers_bit_for_bit(dtype):
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTopKRouter

    config: Any = type("Config", (), {"num_experts_per_tok": 3, "num_experts": E, "hidden_size": D})()
    module, weight, hidden = Qwen3_5MoeTopKRouter(config), draw(E, D, seed=1, dtype=dtype), draw(N, D, dtype=dtype)
    module.weight.data = weight
    for found, expected in zip(router(hidden, weight, top_k=3), module(hidden), strict=True):
        assert torch.equal(found, expected)


# ---------------------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_sum_by_hand(form):
    hidden, gate_up, down, indices, weights = problem(dtype=torch.float64)
    found = form(hidden, gate_up, down, indices, weights)
    for n in range(N):
        expected = torch.zeros(D, dtype=torch.float64)
        for slot, expert in enumerate(indices[n].tolist()):
            gate, up = gate_up[expert, :FF] @ hidden[n], gate_up[expert, FF:] @ hidden[n]
            expected += weights[n, slot] * (down[expert] @ (gate * torch.sigmoid(gate) * up))
        assert_close(found[n], expected, 1e-13)


def size_of_dw(values: Any, cotangent: Tensor) -> float:
    """The largest |dy| |y_slot|: dw is their product summed over D, and may cancel to any smaller number."""
    hidden, gate_up, down, indices, _ = (x.detach().double() if x.is_floating_point() else x for x in values)
    pairs, slots = indices.reshape(-1, 1), indices.shape[1]
    ones = torch.ones(pairs.shape, dtype=torch.float64)
    out = loop_experts(hidden.repeat_interleave(slots, dim=0), gate_up, down, pairs, ones)
    sizes = cotangent.double().repeat_interleave(slots, dim=0).norm(dim=-1) * out.norm(dim=-1)
    return sizes.max().item() if sizes.numel() else 1.0


@pytest.mark.parametrize("tokens", [1, 3, 4, 63, 64, 65, 129])
@pytest.mark.parametrize("top_k,load", [(1, "random"), (2, "random"), (E, "random"), (3, "all to one"),
                                        (2, "empty experts")])
def test_the_forms_agree_on_values_and_gradients(tokens, top_k, load):
    results, cotangent = [], draw(tokens, D, seed=4).float()
    for form in FORMS.values():
        hidden, gate_up, down, indices, weights = problem(tokens, top_k, load)
        leaves = [tensor.requires_grad_() for tensor in (hidden, gate_up, down, weights)]
        out = form(hidden, gate_up, down, indices, weights)
        results.append([out, *torch.autograd.grad(out, leaves, cotangent)])
    size = size_of_dw(problem(tokens, top_k, load), cotangent)
    for result in results[1:]:
        for loop, other in zip(results[0][:-1], result[:-1], strict=True):
            assert_close(other, loop, 1e-6)
        assert (result[-1] - results[0][-1]).abs().max() <= 1e-6 * size


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradcheck(form):
    hidden, gate_up, down, weights = draw(3, 4), draw(3, 4, 4, seed=1), draw(3, 4, 2, seed=2), draw(3, 2, seed=3)
    indices = torch.tensor([[0, 2], [2, 0], [0, 1]])
    leaves = [tensor.requires_grad_() for tensor in (hidden, gate_up, down, weights)]
    assert torch.autograd.gradcheck(lambda h, g, d, w: form(h, g, d, indices, w), leaves)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_permuted_experts_change_nothing(form):
    """Within the bound, and not bit for bit: a token's experts are added in their order."""
    hidden, gate_up, down, indices, weights = problem(top_k=3)
    order = torch.randperm(E, generator=generator(5))
    place = torch.empty_like(order).scatter(0, order, torch.arange(E))
    permuted = form(hidden, gate_up[order], down[order], place[indices], weights)
    assert_close(permuted, form(hidden, gate_up, down, indices, weights), 1e-6)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_permuted_slots_and_permuted_tokens_change_nothing(form):
    hidden, gate_up, down, indices, weights = problem(top_k=3)
    expected = form(hidden, gate_up, down, indices, weights)
    assert_close(form(hidden, gate_up, down, indices.flip(1), weights.flip(1)), expected, 1e-6)
    assert_close(form(hidden.flip(0), gate_up, down, indices.flip(0), weights.flip(0)).flip(0), expected, 1e-6)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_an_expert_nobody_chose_is_not_read_and_has_no_gradient(form):
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
def test_dtypes_stay(form, dtype, tokens):
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
