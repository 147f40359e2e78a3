"""Attention: softmax by hand, the fused form against it, rows with different starts, packed documents, dtypes, gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from qwen35moe import ops
from qwen35moe.ops.attention import attention_weights
from qwen35moe.ops.cpu.attention import sdpa_attention
from tests.support.peer import assert_close, generator

eager_attention = ops.attention.definition

FORMS = {"eager": eager_attention, "sdpa": sdpa_attention}
B, H, G, K = 2, 6, 3, 8
SCALE = 0.31


def draw(
    tokens: int, positions: int, *, batch: int = B, heads: int = H, groups: int = G, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    rng = generator(100 * tokens + positions)
    shapes = ((tokens, heads), (positions, groups), (positions, groups))
    return [torch.randn((batch, *shape, K), generator=rng, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_softmax_by_hand(form):
    """With starts 4, query i sees the keys at positions 0 ... 4 + i of its key head, and no others."""
    query, key, value = draw(3, 9, dtype=torch.float64)
    out = form(query, key, value, scale=SCALE, starts=4)
    for b, t, h in itertools.product(range(B), range(3), range(H)):
        visible = range(4 + t + 1)
        group = h // (H // G)
        scores = [math.exp(SCALE * (query[b, t, h] @ key[b, p, group]).item()) for p in visible]
        expected = sum(w / sum(scores) * value[b, p, group] for w, p in zip(scores, visible, strict=True))
        assert isinstance(expected, Tensor)
        assert_close(out[b, t, h], expected, 1e-13)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("tokens,positions,start", [(7, 7, 0), (3, 9, 6), (1, 12, 11), (1, 1, 0), (4, 12, 5), (65, 65, 0)])
def test_the_fused_form_against_the_definition(tokens, positions, start, groups):
    results = []
    for form in FORMS.values():
        leaves = [tensor.requires_grad_() for tensor in draw(tokens, positions, groups=groups)]
        out = form(*leaves, scale=SCALE, starts=start)
        cotangent = torch.randn(out.shape, generator=generator(1))
        results.append([out, *torch.autograd.grad(out, leaves, cotangent)])
    for name, eager, fused in zip(("out", "query", "key", "value"), *results, strict=True):
        if positions == 1 and name in ("query", "key"):  # the weight of a single key is always 1: no gradient
            assert fused.abs().max() < 1e-6
        else:
            assert_close(fused, eager, 1e-5, name)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_rows_with_different_starts_equal_each_row_alone(form):
    """Positions past the end of a row hold huge numbers: in a static cache they are not written yet."""
    query, key, value = draw(3, 12, batch=4)
    starts = torch.tensor([0, 9, 4, 1])
    for r, start in enumerate(starts.tolist()):
        key[r, start + 3 :], value[r, start + 3 :] = 1e30, 1e30
    out = form(query, key, value, scale=SCALE, starts=starts)
    for r, start in enumerate(starts.tolist()):
        row = [x[r : r + 1] for x in (query, key[:, : start + 3], value[:, : start + 3])]
        assert_close(out[r : r + 1], form(*row, scale=SCALE, starts=start), 1e-5)


@pytest.mark.parametrize("lengths", [[1, 3, 4], [63, 64, 65], [129, 1, 2], [5]], ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_packed_documents_equal_separate_ones(form, lengths):
    bounds = torch.tensor([0, *itertools.accumulate(lengths)])
    leaves = [tensor.requires_grad_() for tensor in draw(sum(lengths), sum(lengths), batch=1)]
    packed = form(*leaves, scale=SCALE, cu_seqlens=bounds)
    parts = [
        form(*(x[:, start:end] for x in leaves), scale=SCALE)
        for start, end in itertools.pairwise(bounds.tolist())
    ]
    separate = torch.cat(parts, dim=1)
    assert_close(packed, separate, 1e-5)
    cotangent = torch.randn(packed.shape, generator=generator(2))
    actual, expected = torch.autograd.grad(packed, leaves, cotangent), torch.autograd.grad(separate, leaves, cotangent)
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, 1e-5)


def test_the_weights_sum_to_one_and_determine_the_output():
    query, key, value = draw(5, 9, dtype=torch.float64)
    weights = attention_weights(query, key, scale=SCALE, starts=4)
    assert weights.shape == (B, H, 5, 9)
    assert_close(weights.sum(-1), torch.ones(B, H, 5, dtype=torch.float64), 1e-14)
    assert (weights[:, :, 0, 5:] == 0).all() and (weights[:, :, 4] > 0).all()
    expected = torch.einsum("bhtp,bphk->bthk", weights, value.repeat_interleave(H // G, dim=2))
    assert_close(eager_attention(query, key, value, scale=SCALE, starts=4), expected, 1e-13)


@pytest.mark.parametrize("starts", [0, torch.tensor([0, 0])], ids=["int", "tensor"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradcheck(form, starts):
    leaves = [tensor[..., :3].clone().requires_grad_() for tensor in draw(3, 3, heads=2, groups=1, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda q, k, v: form(q, k, v, scale=SCALE, starts=starts), leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_output_keeps_the_dtype(form, dtype):
    query, key, value = draw(9, 9, dtype=dtype)
    out = form(query, key, value, scale=SCALE)
    exact = eager_attention(query.double(), key.double(), value.double(), scale=SCALE)
    assert out.dtype == dtype
    assert_close(out, exact, {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype])


def test_dropout_rescales_the_kept_weights():
    query, key, value = draw(64, 64)
    dropped = [eager_attention(query, key, value, scale=SCALE, dropout=0.5) for _ in range(200)]
    plain = eager_attention(query, key, value, scale=SCALE)
    assert not torch.equal(dropped[0], plain)
    assert_close(torch.stack(dropped).mean(0), plain, 0.3)


def test_against_transformers():
    from types import SimpleNamespace

    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import eager_attention_forward

    query, key, value = draw(7, 7)
    mask = torch.full((7, 7), float("-inf")).triu(1)
    module = SimpleNamespace(num_key_value_groups=H // G, training=False)
    their_out, their_weights = eager_attention_forward(
        module, *(x.transpose(1, 2) for x in (query, key, value)), mask, scaling=SCALE  # pyright: ignore
    )
    assert_close(sdpa_attention(query, key, value, scale=SCALE), their_out, 1e-6)
    assert_close(attention_weights(query, key, scale=SCALE), their_weights, 1e-6)
