"""The gated delta rule: the recurrence by hand, and the chunked form against it at difficult gates and keys.

The inputs and the bounds are those of `tests.support.delta_rule`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen35moe import backends
from qwen35moe.ops.cpu import delta_chunks
from qwen35moe.ops.cpu.delta_rule import chunked_gated_delta_rule, chunked_gated_delta_rule_cpu
from tests.support.delta_rule import (
    CUTS,
    EXACT,
    FP32,
    GATES,
    KEYS,
    B,
    G,
    H,
    K,
    V,
    assert_within_bounds,
    call,
    count_subnormals,
    doubles,
    inputs,
    recurrent_gated_delta_rule,
    with_gradients,
)
from tests.support.peer import assert_close, generator

FORMS = {"recurrent": recurrent_gated_delta_rule, "chunked": chunked_gated_delta_rule}


# ---------------------------------------------------------------------------------------------------- the definition


def test_the_recurrence_by_hand():
    """S <- e^g S; S <- S + k (beta (v - S^T k))^T; o = S^T q / sqrt(K), head by head, q and k of unit length."""
    values = inputs(4, dtype=torch.float64)
    out, final = call(recurrent_gated_delta_rule, values)
    unit = {name: values[name] / (values[name].pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for name in ("query", "key")}
    for b, h in itertools.product(range(B), range(H)):
        state, group = values["state"][b, h], h // (H // G)
        for t in range(4):
            q, k, v = unit["query"][b, t, group], unit["key"][b, t, group], values["value"][b, t, h]
            state = state * values["decay"][b, t, h].exp()
            state = state + torch.outer(k, values["beta"][b, t, h] * (v - state.T @ k))
            assert_close(out[b, t, h], state.T @ q / K**0.5, EXACT)
        assert_close(final[b, h], state, EXACT)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradcheck(form):
    values = inputs(3, batch=1, dtype=torch.float64, heads=(1, 2, 2, 3))
    leaves = [tensor.requires_grad_() for tensor in values.values()]

    def flat(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return call(form, dict(zip(values, tensors, strict=True)))

    assert torch.autograd.gradcheck(flat, leaves)


@pytest.mark.parametrize("length", [7, 67])
def test_the_chunked_form_is_the_recurrence_in_float64(length):
    """Values and gradients, to a bound that one rounding to float32 would exceed."""
    values = inputs(length, dtype=torch.float64)
    expected, actual = with_gradients(recurrent_gated_delta_rule, values), with_gradients(chunked_gated_delta_rule, values)
    for name in expected:
        assert_close(actual[name], expected[name], 1e-11, name)


# --------------------------------------------------------------------------- chunked against recurrent, float32


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("gates", GATES)
def test_chunked_against_recurrent(gates, keys):
    values = inputs(130 if keys in ("any", "correlated") else 67, gates=gates, keys=keys)
    truth = with_gradients(recurrent_gated_delta_rule, doubles(values))
    assert_within_bounds(with_gradients(chunked_gated_delta_rule, values), truth, values["decay"].min().item())


@pytest.mark.parametrize("betas", ["0", "1"])
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("gates", ["none", "-0.0001", "ordinary", "-21.0", "any", "hard then soft"])
def test_chunked_against_recurrent_at_beta_0_and_1(gates, keys, betas):
    """With beta 1 and equal keys every token overwrites the same direction of the state: the hardest triangular system.

    The derivative with respect to a decay is then a sum of terms of order one that cancel. After gates of -80 the sum is
    4e-6, of which the recurrence itself has two correct digits in float32: in that one case the error is relative to the
    size of the terms.
    """
    values = inputs(67, gates=gates, keys=keys, betas=betas)
    truth = with_gradients(recurrent_gated_delta_rule, doubles(values))
    actual = with_gradients(chunked_gated_delta_rule, values)
    cancels = (gates, keys, betas) == ("hard then soft", "equal", "1")
    if cancels:
        assert truth["d_decay"].abs().max() < 1e-5
        assert_close(actual.pop("d_decay") + 1.0, truth.pop("d_decay") + 1.0, FP32)
    assert_within_bounds(actual, truth, values["decay"].min().item())


@pytest.mark.parametrize("length", CUTS)
@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
def test_edge_lengths(length, state):
    values = inputs(length, state=state, seed=length)
    truth = with_gradients(recurrent_gated_delta_rule, doubles(values))
    assert_within_bounds(with_gradients(chunked_gated_delta_rule, values), truth, -1.0)
    assert_within_bounds(with_gradients(recurrent_gated_delta_rule, values), truth, -1.0)


@pytest.mark.parametrize("heads", [(1, 1, 3, 2), (1, 5, 4, 9), (4, 4, 9, 4), (2, 6, 16, 16)], ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_head_ratios_and_widths(form, heads):
    values = inputs(66, heads=heads)
    assert_within_bounds(with_gradients(form, values), with_gradients(recurrent_gated_delta_rule, doubles(values)), -1.0)


def test_the_gradient_of_the_decay_is_exact_at_hard_gates():
    """All gates at -28: the gradient is about e^-28 throughout. Differentiating exp(c_i - c_i) on the diagonal would leave
    rounding errors of ordinary size."""
    values = inputs(66, gates="-28.0", state=False)
    truth = with_gradients(recurrent_gated_delta_rule, doubles(values))["d_decay"]
    gradient = with_gradients(chunked_gated_delta_rule, values)["d_decay"]
    assert 0 < truth.abs().max() < 1e-10
    assert (gradient - truth).abs().max() < 1e-13


class _Subnormals(TorchDispatchMode):
    """Counts the subnormal numbers in all float32 results but those of the triangular solve, which are masked afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Uninitialised memory may hold any number.
        if func not in (torch.ops.aten.linalg_solve_triangular.default, *UNINITIALISED):
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor) and tensor.dtype == torch.float32 and not _is_view(func):
                    self.numbers[str(func)] += count_subnormals(tensor)
        return result


UNINITIALISED = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default)


def _is_view(func: Any) -> bool:
    return any(returned.alias_info is not None and not returned.alias_info.is_write for returned in func._schema.returns)


@pytest.mark.parametrize("gates", GATES)
def test_no_value_is_subnormal(gates):
    """CPUs are slow on subnormal numbers. Decays below e^-30 are set to zero, so no operation of the forward produces a
    subnormal number, and no gradient contains one."""
    values = inputs(130, gates=gates)
    with _Subnormals() as subnormals, torch.no_grad():
        call(chunked_gated_delta_rule_cpu, values)
    assert len(subnormals.numbers) > 10 and subnormals.numbers.total() == 0, +subnormals.numbers
    gradients = with_gradients(chunked_gated_delta_rule, values)
    assert {name: count_subnormals(gradient) for name, gradient in gradients.items()} == dict.fromkeys(gradients, 0)


# ------------------------------------------------------------------------------------------------ the explicit backward


@pytest.mark.parametrize("bounds", [None, [0, 1, 3, 130, 131, 300], [0, 0, 128, 128, 300, 300]], ids=str)
def test_the_backward_through_many_blocks(bounds, monkeypatch):
    """Three blocks of four chunks, with boundaries of packed documents inside and between blocks, and empty documents."""
    monkeypatch.setitem(delta_chunks._BLOCK_BYTES, "cpu", 1)
    values = inputs(300, batch=1, dtype=torch.float64, state=False)
    documents = 1 if bounds is None else len(bounds) - 1
    values["state"] = torch.randn(documents, H, K, V, generator=generator(5), dtype=torch.float64)
    options = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds)}

    def definition(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> tuple[Tensor, Tensor]:
        """The recurrence document by document; an empty document returns its initial state."""
        state, outs, finals = named.pop("state"), [], []
        for d, (start, end) in enumerate(itertools.pairwise(bounds or [0, 300])):
            rows = slice(start, end)
            final = state[d : d + 1]
            if end > start:
                gates = {name: gate[:, rows] for name, gate in named.items()}
                out, final = recurrent_gated_delta_rule(query[:, rows], key[:, rows], value[:, rows], **gates, state=final)
                outs.append(out)
            finals.append(final)
        return torch.cat(outs, dim=1), torch.cat(finals)

    truth = with_gradients(definition, values)
    actual = with_gradients(lambda *args, **named: chunked_gated_delta_rule(*args, **named, **options), values)
    for name in truth:
        assert_close(actual[name], truth[name], 1e-11, name)
    out, final = call(chunked_gated_delta_rule_cpu, values, **options)
    assert torch.equal(out, actual["out"]) and torch.equal(final, actual["final"])


@pytest.mark.parametrize("part", ["output", "state"])
def test_the_gradient_of_one_result_alone(part):
    values = {name: tensor.requires_grad_() for name, tensor in inputs(40, dtype=torch.float64).items()}
    results = []
    for form in FORMS.values():
        result = call(form, values)[part == "state"]
        cotangent = torch.randn(result.shape, generator=generator(3), dtype=result.dtype)
        leaves = [tensor for name, tensor in values.items() if part == "output" or name != "query"]
        results.append(torch.autograd.grad(result, leaves, cotangent))
    for recurrent, chunked in zip(*results, strict=True):
        assert_close(recurrent, chunked, 1e-11)


def test_the_tensors_saved_for_the_backward():
    """The inputs, and one recurrent state for every four chunks or more: 32 KiB per token at 35B shapes."""
    values = {name: tensor.requires_grad_() for name, tensor in inputs(512, batch=1, dtype=torch.bfloat16).items()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(chunked_gated_delta_rule, values)
    of_inputs = sum(tensor.nbytes for tensor in values.values())
    assert of_inputs < sum(saved.values()) <= of_inputs + 512 // 128 * 4 * H * K * V


def test_a_second_derivative_is_an_error_that_suggests_recurrent():
    values = {name: tensor.requires_grad_() for name, tensor in inputs(9, dtype=torch.float64).items()}
    (first,) = torch.autograd.grad(call(chunked_gated_delta_rule, values)[0].sum(), values["value"], create_graph=True)
    with pytest.raises(ValueError, match='gated_delta_rule="recurrent"'):
        first.sum().backward()


def test_the_automatic_choice():
    """Without gradients the CPU form without backward, for packed documents too; with gradients the one with a backward."""
    values, bounds = inputs(20, batch=1, state=False), torch.tensor([0, 7, 20])
    args, gates = [values[name] for name in ("query", "key", "value")], {n: values[n] for n in ("decay", "beta")}
    with backends.ran() as ran:
        backends.run("gated_delta_rule", *args, **gates, cu_seqlens=bounds)
        backends.run("gated_delta_rule", args[0].requires_grad_(), *args[1:], **gates, cu_seqlens=bounds)
    assert [record.name for record in ran.calls] == ["chunked_cpu", "torch"]
