"""The forms of the experts: 500 random cases against the loop in float64, gradients, memory, and the choice of a form."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen35moe import backends, ops
from qwen35moe.ops.cpu import sorted_experts as sorted_module
from qwen35moe.ops.cpu.experts import gathered_experts, grouped_experts
from qwen35moe.ops.cpu.sorted_experts import sorted_experts
from qwen35moe.ops.experts import tapped_experts
from tests.ops.test_experts import weight_gradient_scale
from tests.support.peer import assert_close, generator

loop_experts = ops.experts.definition

FORMS: dict[str, Any] = {
    "loop": loop_experts, "sorted": sorted_experts, "grouped": grouped_experts,
    "gathered": gathered_experts, "tapped": tapped_experts,
}
LOADS = ("random", "one expert for all", "empty experts", "repeated in a row", "no token", "one token", "one expert")
# values, gradients: max|a-b| / max|b| against the loop in float64
BOUNDS = {torch.float64: (1e-13, 1e-13), torch.float32: (2e-6, 4e-6), torch.bfloat16: (2e-2, 4e-2)}


def draw(load: str, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, 16], gate_up [E, 2*8, 16], down [E, 16, 8] (16-byte rows: grouped_mm needs them), indices, weights."""
    rng = generator(seed)

    def size(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=rng))

    experts = 1 if load == "one expert" else size(2, 9)
    top_k = min(experts, size(1, 5))
    tokens = {"no token": 0, "one token": 1}.get(load, size(2, 40))
    scores = torch.rand(tokens, experts, generator=rng)
    if load == "empty experts":
        scores[:, ::2] -= 2
        top_k = min(top_k, experts // 2)
    indices = scores.topk(top_k, dim=-1).indices
    if load == "one expert for all":
        indices = torch.full_like(indices[:, :1], size(0, experts))
    if load == "repeated in a row":
        indices = indices[:, :1].expand(-1, 3).contiguous()
    weights = torch.rand(indices.shape, generator=rng, dtype=torch.float64) + 0.1
    hidden, gate_up, down = (
        torch.randn(shape, generator=rng, dtype=torch.float64)
        for shape in ((tokens, 16), (experts, 16, 16), (experts, 16, 8))
    )
    return hidden.to(dtype), (gate_up / 4).to(dtype), (down / 3).to(dtype), indices, weights.to(dtype)


def output_and_gradients(form: Any, values: tuple[Tensor, ...]) -> list[Tensor]:
    """y and the gradients of hidden, gate_up, down and weights for the cotangent cos(0, 1, 2, ...)."""
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in values]
    out = form(*leaves)
    floats = [x for x in leaves if x.requires_grad]
    if not out.requires_grad:  # the loop with no tokens
        return [out, *(torch.zeros_like(x) for x in floats)]
    return [out, *torch.autograd.grad(out, floats, cotangent(out))]


def cotangent(out: Tensor) -> Tensor:
    return torch.arange(out.numel(), dtype=torch.float64).cos().view(out.shape).to(out.dtype)


def widened(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in values)


def random_cases() -> Iterator[tuple[str, int, torch.dtype]]:
    yield from itertools.islice(itertools.product(LOADS, range(24), BOUNDS), 504)


def test_500_random_cases_agree_with_the_loop_in_float64() -> None:
    """Outputs with and without gradients, and all gradients, of every form in every dtype. Where terms cancel, errors are
    relative to the size of the terms: that of a weight's gradient to |dy| |y_j|, and all errors in bfloat16 to 0.3 at least."""
    count = 0
    for load, seed, dtype in random_cases():
        values = draw(load, seed, dtype)
        expected = output_and_gradients(loop_experts, widened(values))
        for name, form in FORMS.items():
            if name == "grouped" and dtype == torch.float64:
                continue
            results = [*output_and_gradients(form, values), form(*values)]
            for index, (actual, truth) in enumerate(zip(results, [*expected, expected[0]], strict=True)):
                assert actual.shape == truth.shape and actual.dtype == dtype
                if truth.numel():
                    size = weight_gradient_scale(values, cotangent(expected[0])) if index == 4 else truth.abs().max().item()
                    error = (actual.double() - truth).abs().max().item() / max(size, 0.3 if dtype == torch.bfloat16 else 1e-30)
                    assert error <= BOUNDS[dtype][0 < index < 5], (name, load, seed, dtype, index, error)
            if values[3].numel():
                assert torch.equal(results[5], form(*values)), "the order of the sum changed between two runs"
        count += 1
    assert count == 504


@pytest.mark.parametrize("block,piece,kept", [(1, 1, 0), (3, 2, 0), (256, 1024, 0), (5, 4, 1 << 30)])
def test_block_sizes_do_not_change_the_sorted_form(block: int, piece: int, kept: int) -> None:
    values = draw("random", 3, torch.float64)
    expected = output_and_gradients(loop_experts, values)
    sizes = dict(_BLOCK=block, _BACKWARD_BLOCK=piece, _PIECE=piece, _KEPT=kept)
    with mock.patch.multiple(sorted_module, **sizes), torch.no_grad():
        assert_close(sorted_experts(*values), expected[0], 1e-13)
    with mock.patch.multiple(sorted_module, **sizes):
        for actual, truth in zip(output_and_gradients(sorted_experts, values), expected, strict=True):
            assert_close(actual, truth, 1e-13)


def test_only_the_required_gradients_are_computed() -> None:
    hidden, gate_up, down, indices, weights = draw("random", 5, torch.float64)
    expected = output_and_gradients(loop_experts, (hidden, gate_up, down, indices, weights))[1:]
    for required in itertools.product((False, True), repeat=4):
        floats = (hidden, gate_up, down, weights)
        leaves = [x.clone().requires_grad_(needed) for x, needed in zip(floats, required, strict=True)]
        out = sorted_experts(leaves[0], leaves[1], leaves[2], indices, leaves[3])
        assert out.requires_grad == any(required)
        if any(required):
            out.backward(cotangent(out))
        for leaf, needed, truth in zip(leaves, required, expected, strict=True):
            assert (leaf.grad is not None) == needed
            if leaf.grad is not None:
                assert_close(leaf.grad, truth, 1e-13)


def test_the_backward_saves_the_pre_activation_only() -> None:
    """Beside the inputs, [N k, 2F] alone: neither the gathered rows [N k, D] nor the outputs of the experts [N k, D]."""
    values = draw("random", 7, torch.float32)
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in values]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        sorted_experts(*leaves)
    assignments = leaves[3].numel()
    inputs = {x.data_ptr() for x in leaves}
    assert [tuple(x.shape) for x in saved if x.data_ptr() not in inputs] == [(assignments, leaves[1].shape[1])]


def test_a_second_derivative_is_an_error_that_suggests_the_loop() -> None:
    hidden, *rest = draw("random", 8, torch.float64)
    hidden.requires_grad_()
    (first,) = torch.autograd.grad(sorted_experts(hidden, *rest).sum(), hidden, create_graph=True)
    with pytest.raises(ValueError, match=r"no second derivative.*experts='loop'"):
        first.sum().backward()


def test_an_index_out_of_range_is_an_error() -> None:
    hidden, gate_up, down, indices, weights = draw("random", 9, torch.float32)
    indices[0, 0] = 11
    for tokens in (1, len(hidden)):
        with pytest.raises(ValueError, match=r"expert 11, the experts are 0 \.\.\."):
            sorted_experts(hidden[:tokens], gate_up, down, indices[:tokens], weights[:tokens])


@pytest.mark.parametrize("form", [grouped_experts, gathered_experts])
def test_the_forms_for_gpus_do_not_synchronise(form: Any) -> None:
    """Fake tensors hold no values: .item(), .tolist() and shapes that depend on values raise an error."""
    values = draw("random", 10, torch.bfloat16)
    with FakeTensorMode() as mode:
        assert form(*(mode.from_tensor(x) for x in values)).shape == values[0].shape
        with pytest.raises(Exception, match="[Dd]ata.?[Dd]ependent|aten::_local_scalar_dense|aten.bincount"):
            tapped_experts(*(mode.from_tensor(x) for x in values))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 300])
def test_the_automatic_choice_does_not_synchronise_on_a_gpu(tokens: int) -> None:
    rng = generator(tokens)
    hidden, gate_up, down = (
        torch.randn(shape, generator=rng).bfloat16().cuda().requires_grad_()
        for shape in ((tokens, 64), (8, 64, 64), (8, 64, 32))
    )
    indices = torch.rand(tokens, 8, generator=rng).topk(2).indices.cuda()
    weights = torch.rand(tokens, 2, generator=rng).bfloat16().cuda()
    backends.run("experts", hidden, gate_up, down, indices, weights)  # kernels are compiled in the first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        backends.run("experts", hidden, gate_up, down, indices, weights).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_compile_with_fullgraph(dtype: torch.dtype) -> None:
    values = draw("random", 11, dtype)
    expected = output_and_gradients(loop_experts, widened(values))
    compiled = torch.compile(lambda *arguments: backends.run("experts", *arguments), fullgraph=True, backend="aot_eager")
    for actual, truth in zip(output_and_gradients(compiled, values), expected, strict=True):
        assert_close(actual, truth, 2 * BOUNDS[dtype][1])
    assert torch.library.opcheck(
        torch.ops.qwen35moe.experts.default, (*(x.requires_grad_() if x.is_floating_point() else x for x in values), True),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_the_automatic_choice() -> None:
    few, many = draw("one token", 12, torch.float32), draw("random", 12, torch.float32)
    wide = (many[0].repeat(1, 128), torch.zeros(8, 16, 2048), torch.zeros(8, 2048, 8), many[3] % 8, many[4])
    with backends.ran() as ran:
        backends.run("experts", *few)
        backends.run("experts", *wide)
        backends.run("experts", *few, tap=lambda name, value: value)
        with backends.use(experts="grouped"):  # slower on a CPU, but it can be chosen
            backends.run("experts", *many)
    assert [call.name for call in ran.calls] == ["gathered", "sorted", "tapped", "grouped"]
    description = backends.describe("experts", *wide)
    assert "sorted        runs these arguments" in description
    assert "could run these arguments, more slowly: on a CPU" in description
