"""Attention: softmax by hand, the fused form against it, ragged starts, packed documents, dtypes, gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe import ops
from qwen35moe.ops.attention import attention_weights
from qwen35moe.ops.cpu.attention import sdpa_attention
from qwen35moe.ops.cpu.vision_attention import vision_attention_torch
from tests.support.peer import assert_close, generator

eager_attention = ops.attention.definition

FORMS = {"eager": eager_attention, "sdpa": sdpa_attention}
B, H, G, K = 2, 6, 3, 8
SCALE = 0.31


def draw(
    tokens: int, slots: int, *, batch: int = B, heads: int = H, groups: int = G, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    rng = generator(100 * tokens + slots)
    shapes = ((tokens, heads), (slots, groups), (slots, groups))
    return [torch.randn((batch, *shape, K), generator=rng, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_softmax_by_hand(form):
    """Token i of a chunk that starts at slot 4 sees slots 0 ... 4 + i of its key head, and no others."""
    query, key, value = draw(3, 9, dtype=torch.float64)
    out = form(query, key, value, scale=SCALE, starts=4)
    for b, t, h in itertools.product(range(B), range(3), range(H)):
        seen = range(4 + t + 1)
        group = h // (H // G)
        scores = [math.exp(SCALE * (query[b, t, h] @ key[b, s, group]).item()) for s in seen]
        expected = sum(w / sum(scores) * value[b, s, group] for w, s in zip(scores, seen, strict=True))
        assert isinstance(expected, Tensor)
        assert_close(out[b, t, h], expected, 1e-13)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("tokens,slots,start", [(7, 7, 0), (3, 9, 6), (1, 12, 11), (1, 1, 0), (4, 12, 5), (65, 65, 0)])
def test_the_fused_form_is_the_definition(tokens, slots, start, groups):
    results = []
    for form in FORMS.values():
        leaves = [tensor.requires_grad_() for tensor in draw(tokens, slots, groups=groups)]
        out = form(*leaves, scale=SCALE, starts=start)
        cotangent = torch.randn(out.shape, generator=generator(1))
        results.append([out, *torch.autograd.grad(out, leaves, cotangent)])
    for name, eager, fused in zip(("out", "query", "key", "value"), *results, strict=True):
        if slots == 1 and name in ("query", "key"):  # one key has weight 1 whatever its score: no gradient
            assert fused.abs().max() < 1e-6
        else:
            assert_close(fused, eager, 1e-5, name)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_rows_that_start_at_different_slots_equal_each_row_alone(form):
    """And slots that nobody may see hold NaN: past a row's length a static cache has never been written."""
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
    found, expected = torch.autograd.grad(packed, leaves, cotangent), torch.autograd.grad(separate, leaves, cotangent)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-5)


def test_the_weights_sum_to_one_and_give_the_output():
    query, key, value = draw(5, 9, dtype=torch.float64)
    weights = attention_weights(query, key, scale=SCALE, starts=4)
    assert weights.shape == (B, H, 5, 9)
    assert_close(weights.sum(-1), torch.ones(B, H, 5, dtype=torch.float64), 1e-14)
    assert (weights[:, :, 0, 5:] == 0).all() and (weights[:, :, 4] > 0).all()
    expected = torch.einsum("bhts,bshk->bthk", weights, value.repeat_interleave(H // G, dim=2))
    assert_close(eager_attention(query, key, value, scale=SCALE, starts=4), expected, 1e-13)


@pytest.mark.parametrize("starts", [0, torch.tensor([0, 0])], ids=["int", "tensor"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradcheck(form, starts):
    leaves = [tensor[..., :3].clone().requires_grad_() for tensor in draw(3, 3, heads=2, groups=1, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda q, k, v: form(q, k, v, scale=SCALE, starts=starts), leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_dtypes_stay(form, dtype):
    query, key, value = draw(9, 9, dtype=dtype)
    out = form(query, key, value, scale=SCALE)
    exact = eager_attention(query.double(), key.double(), value.double(), scale=SCALE)
    assert out.dtype == dtype
    assert_close(out, exact, {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype])


def test_dropout_scales_what_is_left():
    query, key, value = draw(64, 64)
    kept = [eager_attention(query, key, value, scale=SCALE, dropout=0.5) for _ in range(200)]
    plain = eager_attention(query, key, value, scale=SCALE)
    assert not torch.equal(kept[0], plain)
    assert_close(torch.stack(kept).mean(0), plain, 0.3)


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


def test_vision_attention_sees_its_own_frame_in_both_directions():
    rng = generator(0)
    query, key, value = (torch.randn((13, 3, 8), generator=rng, dtype=torch.float64) for _ in range(3))
    bounds = torch.tensor([0, 4, 5, 13])
    out = vision_attention_torch(query, key, value, cu_seqlens=bounds, scale=SCALE)
    for start, end in itertools.pairwise(bounds.tolist()):
        q, k, v = (x[start:end] for x in (query, key, value))
        weights = F.softmax(torch.einsum("nhk,mhk->hnm", q, k) * SCALE, dim=-1)
        assert_close(out[start:end], torch.einsum("hnm,mhk->nhk", weights, v), 1e-13)
