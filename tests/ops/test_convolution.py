"""The short convolution: by hand, the forms against each other, states, right padding, packed documents."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe import ops
from qwen35moe.ops.cpu.convolution import short_convolution_cpu, short_convolution_torch
from tests.support.peer import assert_close, randn

FORMS = {"direct": ops.short_convolution.definition, "shifted": short_convolution_torch, "cpu": short_convolution_cpu}
CUTS = [1, 3, 4, 63, 64, 65, 129]
B, C = 2, 6
EXACT = 1e-14


@pytest.mark.parametrize("taps", [2, 3, 4, 5])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_sum_by_hand_with_a_state(form, taps):
    x, weight, state = randn(B, 9, C), randn(C, taps, seed=1), randn(B, C, taps - 1, seed=2)
    y, after = form(x, weight, state=state)
    for b, t, c in itertools.product(range(B), range(9), range(C)):
        row = [*state[b, c].tolist(), *x[b, :, c].tolist()]
        total = sum(weight[c, w].item() * row[t + w] for w in range(taps))
        assert y[b, t, c].item() == pytest.approx(F.silu(torch.tensor(total, dtype=torch.float64)).item(), rel=1e-12)
    assert torch.equal(after, torch.cat([state, x.mT], dim=-1)[..., -(taps - 1) :])


@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_against_torch_conv1d(form, taps):
    x, weight = randn(B, 70, C), randn(C, taps, seed=1)
    expected = F.silu(F.conv1d(F.pad(x.mT, (taps - 1, 0)), weight[:, None], groups=C)).mT
    y, state = form(x, weight)
    assert_close(y, expected, EXACT)
    assert torch.equal(state, x.mT[..., -(taps - 1) :])


@pytest.mark.parametrize("options", ["plain", "state", "lengths", "packed"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradcheck(form, options):
    x, weight = randn(2, 5, 3).requires_grad_(), randn(3, 4, seed=1).requires_grad_()
    leaves, named = [x, weight], {}
    if options == "state":
        leaves.append(randn(2, 3, 3, seed=2).requires_grad_())
    elif options == "lengths":
        named = {"lengths": torch.tensor([5, 2])}
    elif options == "packed":
        leaves = [randn(1, 7, 3).requires_grad_(), weight, randn(3, 3, 3, seed=2).requires_grad_()]
        named = {"cu_seqlens": torch.tensor([0, 1, 5, 7])}

    def call(x: Tensor, weight: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, after = form(x, weight, state=state, **named)
        if options == "lengths":  # past the length of a row the output is unspecified
            y = torch.cat([y[0], y[1, :2]])
        return y, after

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("taps", [2, 4, 5])
@pytest.mark.parametrize("length", CUTS)
def test_the_forms_agree_on_values_states_and_gradients(length, taps, monkeypatch):
    monkeypatch.setattr("qwen35moe.ops.cpu.convolution._BLOCK_BYTES", B * C * 4 * 16)  # blocks of 16 tokens
    x, weight = randn(B, length, C, dtype=torch.float32), randn(C, taps, seed=1, dtype=torch.float32)
    state = randn(B, C, taps - 1, seed=2, dtype=torch.float32)
    results = []
    for form in FORMS.values():
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, state)]
        y, after = form(leaves[0], leaves[1], state=leaves[2])
        cotangents = randn(*y.shape, seed=3).float(), randn(*after.shape, seed=4).float()
        results.append([y, after, *torch.autograd.grad([y, after], leaves, cotangents)])
    for direct, shifted, cpu in zip(*results, strict=True):
        assert_close(shifted, direct, 1e-5)
        assert_close(cpu, direct, 1e-5)


# States are slices of the inputs and equal bit for bit. So are outputs with 32 channels, which fill whole vectors. With C
# channels the last entries of a tensor, which depend on its length, go through the scalar silu, whose last bit differs.
WIDTHS = pytest.mark.parametrize("channels,bound", [(32, 0.0), (C, 3e-7)])


@WIDTHS
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_prefix_and_the_rest_equal_the_whole_row(form, cut, channels, bound):
    x, weight = randn(B, cut + 5, channels).float(), randn(channels, 4, seed=1).float()
    whole, end = form(x, weight)
    head, carried = form(x[:, :cut], weight)
    rest, after = form(x[:, cut:], weight, state=carried)
    assert_close(torch.cat([head, rest], dim=1), whole, bound)
    assert torch.equal(after, end)


@WIDTHS
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_one_token_at_a_time_equals_the_whole_row(form, channels, bound):
    x, weight = randn(B, 9, channels).float(), randn(channels, 4, seed=1).float()
    whole, end = form(x, weight)
    steps, state = [], None
    for t in range(9):
        y, state = form(x[:, t : t + 1], weight, state=state)
        steps.append(y)
    assert state is not None
    assert_close(torch.cat(steps, dim=1), whole, bound)
    assert torch.equal(state, end)


@WIDTHS
@pytest.mark.parametrize("lengths", [[1, 3, 4], [63, 64, 65], [129, 1, 2], [5]], ids=str)
@pytest.mark.parametrize("carried", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_packed_documents_equal_separate_ones(form, carried, lengths, channels, bound):
    x, weight = randn(1, sum(lengths), channels).float(), randn(channels, 4, seed=1).float()
    state = randn(len(lengths), channels, 3, seed=2).float() if carried else None
    bounds = torch.tensor([0, *itertools.accumulate(lengths)])
    y, after = form(x, weight, state=state, cu_seqlens=bounds)
    assert after.shape == (len(lengths), channels, 3)
    for d, (start, end) in enumerate(itertools.pairwise(bounds.tolist())):
        alone, last = form(x[:, start:end], weight, state=None if state is None else state[d : d + 1])
        assert_close(y[:, start:end], alone, bound)
        assert torch.equal(after[d : d + 1], last)


@WIDTHS
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_state_of_a_right_padded_row_ends_before_the_padding(form, channels, bound):
    x, weight = randn(4, 6, channels).float(), randn(channels, 4, seed=1).float()
    state, lengths = randn(4, channels, 3, seed=2).float(), torch.tensor([6, 1, 4, 2])
    for r, length in enumerate(lengths.tolist()):
        x[r, length:] = float("nan")  # must not be read
    y, after = form(x, weight, state=state, lengths=lengths)
    for r, length in enumerate(lengths.tolist()):
        alone, last = form(x[r : r + 1, :length], weight, state=state[r : r + 1])
        assert_close(y[r : r + 1, :length], alone, bound)
        assert torch.equal(after[r : r + 1], last)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_output_keeps_the_dtype_and_bfloat16_is_rounded_once(form, dtype):
    x, weight = randn(B, 70, C, dtype=dtype), randn(C, 4, seed=1, dtype=dtype)
    y, state = form(x, weight)
    wide = torch.promote_types(dtype, torch.float32)
    assert y.dtype == state.dtype == dtype
    assert torch.equal(y, form(x.to(wide), weight.to(wide))[0].to(dtype))


def test_against_transformers():
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import causal_conv1d_fn, causal_conv1d_update

    x, weight = randn(B, 70, C).float(), randn(C, 4, seed=1).float()
    y, state = short_convolution_torch(x, weight)
    assert_close(y, causal_conv1d_fn(x.mT, weight, activation="silu").mT, 1e-6)
    their_state: Any = F.pad(state, (1, 0))  # W inputs, of which the oldest is not used
    new = randn(B, 1, C, seed=3).float()
    stepped, after = short_convolution_torch(new, weight, state=state)
    assert_close(stepped, causal_conv1d_update(new.mT.contiguous(), their_state, weight, activation="silu").mT, 1e-6)
    assert torch.equal(after, their_state[..., 1:])
