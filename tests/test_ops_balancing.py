"""The routers' losses: load balancing, whole and in parts, and the z-loss."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from qwen35moe.ops.balancing import load_balancing_loss
from tests.peer import assert_close, generator

LAYERS, EXPERTS, SLOTS, TOKENS = 3, 7, 2, 20


def routed(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor], Tensor]:
    rng = generator(0)
    logits = [torch.randn((TOKENS, EXPERTS), generator=rng, dtype=torch.float64).to(dtype) for _ in range(LAYERS)]
    indices = [layer.topk(SLOTS, dim=-1).indices for layer in logits]
    return logits, indices, (torch.rand(TOKENS, generator=rng) < 0.7).long()


def by_hand(logits: list[Tensor], indices: list[Tensor], mask: Tensor) -> Tensor:
    """The share of (token, layer) pairs that chose each expert times its mean probability, summed, times E."""
    chosen, probability, pairs = torch.zeros(EXPERTS).double(), torch.zeros(EXPERTS), 0
    for layer, picks in zip(logits, indices, strict=True):
        for n in range(TOKENS):
            if mask[n]:
                pairs += 1
                probability = probability + layer[n].softmax(-1)
                for expert in picks[n].tolist():
                    chosen[expert] += 1
    return EXPERTS * (chosen / pairs * probability / pairs).sum()


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_by_hand_and_per_layer(masked):
    logits, indices, mask = routed()
    given = mask if masked else None
    mask = mask if masked else torch.ones(TOKENS)
    assert_close(load_balancing_loss(logits, indices, mask=given), by_hand(logits, indices, mask), 1e-12)
    layers = load_balancing_loss(logits, indices, mask=given, per_layer=True)
    assert layers.shape == (LAYERS,)
    for layer in range(LAYERS):
        assert_close(layers[layer], by_hand(logits[layer : layer + 1], indices[layer : layer + 1], mask), 1e-12)


def test_an_even_load_gives_the_slots_or_one():
    logits = [torch.zeros(EXPERTS, EXPERTS)]
    indices = [torch.stack([torch.arange(EXPERTS), (torch.arange(EXPERTS) + 1) % EXPERTS], dim=1)]
    assert load_balancing_loss(logits, indices).item() == pytest.approx(SLOTS)
    assert load_balancing_loss(logits, indices, normalize="top_k").item() == pytest.approx(1)
    with pytest.raises(ValueError, match="mean.*transformers.*top_k"):
        load_balancing_loss(logits, indices, normalize="mean")


def test_the_indices_that_were_used_are_counted():
    logits, indices, _ = routed()
    replayed = [torch.zeros_like(layer) + torch.arange(SLOTS) for layer in indices]
    used, recounted = load_balancing_loss(logits, replayed), load_balancing_loss(logits, indices)
    assert_close(used, by_hand(logits, replayed, torch.ones(TOKENS)), 1e-12)
    assert abs(used - recounted) > 0.05


def test_load_balancing_gradcheck_and_dtypes():
    logits, indices, mask = routed()
    leaves = [layer.requires_grad_() for layer in logits]
    assert torch.autograd.gradcheck(lambda *layers: load_balancing_loss(layers, indices, mask=mask), leaves)
    wides = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
    for dtype, wide in wides.items():
        logits, indices, _ = routed(dtype)
        assert load_balancing_loss(logits, indices).dtype == wide


@pytest.mark.parametrize("masked", [False, True])
def test_equal_to_transformers_in_float32(masked):
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import load_balancing_loss_func

    logits, indices, mask = routed(torch.float32)
    given = mask if masked else None
    theirs = load_balancing_loss_func(tuple(logits), EXPERTS, SLOTS, given)
    assert isinstance(theirs, Tensor)
    assert_close(load_balancing_loss(logits, indices, mask=given), theirs, 1e-6)


def test_logits_and_indices_of_different_layers_are_refused():
    logits, indices, _ = routed()
    for few, many in itertools.permutations([2, 3], 2):
        with pytest.raises(ValueError, match=f"{few} and {many}"):
            load_balancing_loss(logits[:few], indices[:many])
    with pytest.raises(ValueError, match="0 and 0"):
        load_balancing_loss([], [])
