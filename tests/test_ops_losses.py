"""Cross entropy with and without logits in memory, shifted labels, and the load-balancing loss."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe.ops import losses
from qwen35moe.ops.losses import (
    chunked_linear_cross_entropy,
    linear_cross_entropy,
    load_balancing_loss,
    shift_labels,
)
from tests.peer import assert_close, generator

FORMS = {"direct": linear_cross_entropy, "chunked": chunked_linear_cross_entropy}
WORDS, D = 31, 6


def draw(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    rng = generator(tokens)
    hidden = torch.randn((tokens, D), generator=rng, dtype=torch.float64).to(dtype)
    weight = torch.randn((WORDS, D), generator=rng, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, WORDS, (tokens,), generator=rng)
    labels[::3] = -100
    labels[-1] = 4
    return hidden, weight, labels


@pytest.fixture(autouse=True)
def small_chunks():
    """Chunks of 4 tokens, so that the chunked form has several."""
    with mock.patch.object(losses, "_TOKENS_AT_ONCE", 4):
        yield


@pytest.mark.parametrize("num_items", [None, 5, torch.tensor(7)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 17])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_cross_entropy_by_hand(form, tokens, num_items):
    hidden, weight, labels = draw(tokens)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = form(hidden, weight, labels, num_items=num_items)
    logits = hidden @ weight.T
    picked = [(logits[n].exp().sum().log() - logits[n, word]) for n, word in enumerate(labels.tolist()) if word != -100]
    expected = torch.stack(picked).sum() / (len(picked) if num_items is None else num_items)
    assert_close(loss, expected, 1e-13)
    found, right = torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight))
    for a, b in zip(found, right, strict=True):
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradcheck(form):
    hidden, weight, labels = draw(5)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: form(h, w, labels), leaves)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_bfloat16_logits_have_a_float32_loss(form):
    hidden, weight, labels = draw(17, torch.bfloat16)
    loss = form(hidden, weight, labels)
    assert loss.dtype == torch.float32
    assert_close(loss, F.cross_entropy((hidden @ weight.T).float(), labels), 1e-6)
    assert form(*draw(17)).dtype == torch.float64


def test_the_chunked_form_never_holds_all_logits():
    """What autograd keeps between forward and backward is smaller than one row of logits per token."""
    hidden, weight, labels = draw(64, torch.float32)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunked_linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels)
    assert max(kept, default=0) < 64 * WORDS


def test_labels_shift_by_one_and_stop_at_the_end_of_documents():
    labels = torch.arange(10, 22)[None]
    assert shift_labels(labels)[0].tolist() == [*range(11, 22), -100]
    bounds = torch.tensor([0, 1, 5, 12])
    expected = [-100, 12, 13, 14, -100, 16, 17, 18, 19, 20, 21, -100]
    assert shift_labels(labels, bounds)[0].tolist() == expected
    assert labels[0].tolist() == list(range(10, 22))


# ---------------------------------------------------------------------------------------------------- load balancing

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
