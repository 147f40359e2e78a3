"""Properties of both forms of the gated delta rule: parts and wholes, packed documents, dtypes, and transformers' functions."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.ops.test_delta_rule import FORMS
from tests.support.delta_rule import (
    CUTS,
    EXACT,
    FP32,
    B,
    H,
    K,
    V,
    call,
    doubles,
    inputs,
    recurrent_gated_delta_rule,
)
from tests.support.peer import assert_close, generator, relative_error


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("first,second", list(itertools.product(FORMS, FORMS)))
def test_a_prefix_and_the_rest_equal_the_whole_row(first, second, cut):
    """For every combination of forms; bit for bit where both are the recurrence."""
    values = inputs(cut + 5, seed=cut)
    whole, final = call(FORMS[second], values)
    head, carried = call(FORMS[first], {n: t if n == "state" else t[:, :cut] for n, t in values.items()})
    rest, end = call(FORMS[second], {n: carried if n == "state" else t[:, cut:] for n, t in values.items()})
    bound = 0.0 if (first, second) == ("recurrent", "recurrent") else FP32
    assert_close(torch.cat([head, rest], dim=1), whole, bound)
    assert_close(end, final, bound)


@pytest.mark.parametrize("lengths", [[1, 3, 4], [63, 64, 65], [129, 1, 2], [5], [64, 64]], ids=str)
@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_packed_documents_equal_separate_ones(form, state, lengths):
    """Outputs, final states and all gradients, also that of the initial state of every document."""
    values = inputs(sum(lengths), batch=1, state=False, gates="ordinary")
    states = torch.randn(len(lengths), H, K, V, generator=generator(5))
    bounds = torch.tensor([0, *itertools.accumulate(lengths)])
    packed_values = values | ({"state": states} if state else {})
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in packed_values.items()}
    out, final = call(form, leaves, cu_seqlens=bounds)
    assert final.shape == (len(lengths), H, K, V)
    cotangent = torch.randn(out.shape, generator=generator(6)), torch.randn(final.shape, generator=generator(7))
    packed = torch.autograd.grad([out, final], list(leaves.values()), cotangent)

    alone = {name: tensor.clone().requires_grad_() for name, tensor in packed_values.items()}
    outs, finals = [], []
    for d, (start, end) in enumerate(itertools.pairwise(bounds.tolist())):
        part = {n: t[d : d + 1] if n == "state" else t[:, start:end] for n, t in alone.items()}
        o, f = call(form, part)
        outs.append(o)
        finals.append(f)
    separate = torch.autograd.grad([torch.cat(outs, 1), torch.cat(finals)], list(alone.values()), cotangent)
    assert_close(out, torch.cat(outs, 1), FP32, "out")
    assert_close(final, torch.cat(finals), FP32, "final state")
    for name, gradient, expected in zip(leaves, packed, separate, strict=True):
        assert_close(gradient, expected, FP32, f"gradient of {name}")


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_row_of_a_batch_equals_the_row_alone(form):
    values = inputs(66)
    out, final = call(form, values)
    for r in range(B):
        alone, end = call(form, {name: tensor[r : r + 1] for name, tensor in values.items()})
        assert_close(alone, out[r : r + 1], FP32)
        assert_close(end, final[r : r + 1], FP32)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_tokens_with_decay_0_and_beta_0_leave_the_state_unchanged(form):
    """Padding is masked in this way. Bit for bit in the recurrence."""
    values = inputs(9)
    values["decay"][:, 4:] = 0.0
    values["beta"][:, 4:] = 0.0
    _, through = call(form, values)
    _, before = call(form, {name: t if name == "state" else t[:, :4] for name, t in values.items()})
    assert_close(through, before, 0.0 if form is recurrent_gated_delta_rule else FP32)


# ---------------------------------------------------------------------------------------------------- dtypes and inputs


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_dtypes(form):
    """The output has the dtype of the query; the state is float32 at least; float64 is float64 throughout."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        wide = torch.promote_types(dtype, torch.float32)
        values = inputs(66, dtype=dtype)
        values["decay"], values["state"] = values["decay"].to(wide), values["state"].to(wide)
        out, state = call(form, values)
        assert (out.dtype, state.dtype) == (dtype, wide)
        truth, end = call(recurrent_gated_delta_rule, doubles(values))
        assert relative_error(out, truth) < {torch.bfloat16: 5e-3, torch.float32: FP32, torch.float64: EXACT}[dtype]
        assert relative_error(state, end) < {torch.float64: EXACT}.get(dtype, FP32)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_inputs_are_not_modified(form):
    values = inputs(66)
    copies = {name: tensor.clone() for name, tensor in values.items()}
    call(form, values)
    for name, tensor in values.items():
        assert torch.equal(tensor, copies[name]), f"{name} was modified"


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_against_transformers(form):
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as peer

    values = inputs(66)
    out, state = call(form, values)
    for rule in (peer.torch_chunk_gated_delta_rule, peer.torch_recurrent_gated_delta_rule):
        their_out, their_state = rule(
            values["query"], values["key"], values["value"], g=values["decay"], beta=values["beta"],
            initial_state=values["state"], output_final_state=True, use_qk_l2norm_in_kernel=True,
        )
        assert_close(out, their_out, 1e-5)
        assert_close(state, their_state, 1e-5)
