"""Cross entropy of logits computed whole and in chunks, and shifted labels."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe import ops
from qwen35moe.ops.cpu import losses
from qwen35moe.ops.cpu.losses import chunked_linear_cross_entropy
from qwen35moe.ops.losses import cross_entropy, shift_labels
from tests.support.peer import assert_close, generator

FORMS = {"direct": ops.linear_cross_entropy.definition, "chunked": chunked_linear_cross_entropy}
VOCABULARY, D = 31, 6


def draw(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    rng = generator(tokens)
    hidden = torch.randn((tokens, D), generator=rng, dtype=torch.float64).to(dtype)
    weight = torch.randn((VOCABULARY, D), generator=rng, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, VOCABULARY, (tokens,), generator=rng)
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
    terms = [(logits[n].exp().sum().log() - logits[n, label]) for n, label in enumerate(labels.tolist()) if label != -100]
    expected = torch.stack(terms).sum() / (len(terms) if num_items is None else num_items)
    assert_close(loss, expected, 1e-13)
    actual, expected_gradients = torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight))
    for a, b in zip(actual, expected_gradients, strict=True):
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


def test_the_chunked_form_does_not_save_all_logits():
    """The largest tensor that autograd saves is smaller than the logits of all tokens."""
    hidden, weight, labels = draw(64, torch.float32)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunked_linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels)
    assert max(saved, default=0) < 64 * VOCABULARY


def test_labels_are_shifted_within_documents():
    labels = torch.arange(10, 22)[None]
    assert shift_labels(labels)[0].tolist() == [*range(11, 22), -100]
    bounds = torch.tensor([0, 1, 5, 12])
    expected = [-100, 12, 13, 14, -100, 16, 17, 18, 19, 20, 21, -100]
    assert shift_labels(labels, bounds)[0].tolist() == expected
    assert labels[0].tolist() == list(range(10, 22))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_stands_at_an_ignored_label_reaches_neither_the_loss_nor_a_gradient(form, value):
    hidden, weight, labels = draw(9)
    dirty = hidden.clone()
    dirty[labels == -100] = value
    results = []
    for x in (hidden, dirty):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = form(*leaves, labels, num_items=5)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(results[1][1][labels == -100], torch.zeros_like(hidden[labels == -100]))
    logits = (dirty @ weight.T).requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(logits, labels), logits)
    assert torch.equal(gradient[labels == -100], torch.zeros(int((labels == -100).sum()), VOCABULARY).double())
    assert gradient.isfinite().all()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_no_label_counts_and_labels_of_other_integers(form):
    hidden, weight, labels = draw(9)
    nothing = torch.full_like(labels, -100)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = form(*leaves, nothing, num_items=3)
    assert loss.item() == 0 and all(not g.any() for g in torch.autograd.grad(loss, leaves))
    assert form(hidden, weight, nothing).isnan()  # the mean over nothing, as in torch
    assert torch.equal(form(hidden, weight, labels.int()), form(hidden, weight, labels))


def test_the_chunked_gradient_in_float32_has_the_bits_of_the_definition_block_by_block():
    hidden, weight, labels = draw(11, torch.float32)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    definition, rows = ops.linear_cross_entropy.definition, [slice(n, n + 4) for n in (0, 4, 8)]
    blocks = [definition(leaves[0][n], leaves[1], labels[n], num_items=1) for n in rows]
    expected = torch.autograd.grad((blocks[0] + blocks[1] + blocks[2]) / 5, leaves)
    actual = torch.autograd.grad(chunked_linear_cross_entropy(*leaves, labels, num_items=5), leaves)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
