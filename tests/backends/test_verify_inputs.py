"""`backends.verify` fails an implementation that changes its arguments, and names them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe import backends, ops

pytestmark = pytest.mark.usefixtures("own_table")

loop_experts = ops.experts.definition
rms_norm = ops.rms_norm.definition
recurrent = ops.gated_delta_rule.definition
OTHER_NAN = 0x7FC0_0001  # a NaN with other bits than torch's


def failures(operation: str, fn: Callable[..., Any], **options: Any) -> set[str | None]:
    """What `verify` reports for a new implementation; None for a case that passed."""
    backends.register(operation, "mine", fn, **options)
    try:
        report = backends.verify("mine", device="cpu")
    finally:
        backends.unregister(operation, "mine")
    assert report.ran and report.ok == all(row.failure is None for row in report.ran), str(report)
    return {row.failure for row in report.ran}


def changed(names: str) -> set[str]:
    return {f"it changed its argument {names}; callers go on using their tensors: write to a copy"}


@pytest.fixture
def norms() -> None:
    backends.add_cases("rms_norm", rms_norm, norm_cases)


def norm_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Iterator[tuple[tuple, dict]]:
    x = torch.randn(2, 3, 4, generator=generator).to(device, dtype)
    x[0, 0, 0] = 0.0
    yield (x, torch.randn(4, generator=generator).to(device, dtype)), {"eps": 0.5}
    yield (x.mT.contiguous().mT, x[1, 1].clone()), {"eps": 0.25}  # not contiguous


def expert_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Iterator[tuple[tuple, dict]]:
    """No token chooses expert 3, whose weights are NaN."""
    shapes = (5, 6), (4, 14, 6), (4, 6, 7)
    hidden, gate_up, down = (torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes)
    gate_up[3] = float("nan")
    indices = torch.tensor([[2, 0], [1, 0], [0, 2], [2, 1], [1, 2]], device=device)
    yield (hidden, gate_up, down, indices, torch.rand(5, 2, generator=generator).to(device, dtype)), {}


@pytest.mark.usefixtures("norms")
@pytest.mark.parametrize("argument", ["x", "weight"])
def test_one_bit(argument: str) -> None:
    def flips(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        y = rms_norm(x, weight, eps=eps)
        bits = {"x": x, "weight": weight}[argument].detach()
        bits[(..., *(0,) * (bits.dim() - 1), 1)].view(torch.int32).bitwise_xor_(1)
        return y

    assert failures("rms_norm", flips, differentiable=False) == changed(argument)
    assert failures("rms_norm", flips) == changed(argument)  # named before autograd notices


@pytest.mark.usefixtures("norms")
def test_the_sign_of_a_zero_the_shape_and_the_backward() -> None:
    def negates(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        y = rms_norm(x, weight, eps=eps)
        x.detach()[x.detach() == 0] = -0.0
        return y

    def transposes(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        y = rms_norm(x, weight, eps=eps)
        x.t_() if x.dim() == 2 else x.transpose_(0, 1)
        return y

    class Spoils(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor, weight: Tensor) -> Tensor:
            ctx.weight = weight.detach()
            return y.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
            ctx.weight.add_(1)
            return dy, None

    def spoils(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        return Spoils.apply(rms_norm(x, weight.clone(), eps=eps), weight)

    def reads(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
        return rms_norm(x, weight, eps=eps)

    assert changed("x") <= failures("rms_norm", negates, differentiable=False)
    assert failures("rms_norm", transposes, differentiable=False) == changed("x")
    assert failures("rms_norm", spoils) == changed("weight")
    assert failures("rms_norm", reads) == {None}


def test_nan_is_equal_to_the_same_nan_only() -> None:
    backends.add_cases("experts", loop_experts, expert_cases)

    def rewrites(nan: Tensor) -> Callable[..., Tensor]:
        def run(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
            gate_up.view(torch.int32)[3, 1] = nan
            return loop_experts(hidden, gate_up, down, indices, weights)

        return run

    same = torch.tensor(float("nan")).view(torch.int32)
    assert failures("experts", rewrites(same), differentiable=False) == {None}
    assert failures("experts", rewrites(torch.tensor(OTHER_NAN, dtype=torch.int32)), differentiable=False) == changed("gate_up")


def test_a_state_in_place() -> None:
    def run(query: Tensor, key: Tensor, value: Tensor, *, state: Tensor | None = None, **options: Any) -> Any:
        out, after = recurrent(query, key, value, state=state, **options)
        return out, after if state is None else state.copy_(after)

    def step(
        query: Tensor, key: Tensor, value: Tensor, *, decay: Tensor, beta: Tensor, state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Any:  # fmt: skip
        return run(query, key, value, decay=decay, beta=beta, state=state, cu_seqlens=cu_seqlens)

    def grows(
        query: Tensor, key: Tensor, value: Tensor, *, decay: Tensor, beta: Tensor, state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Any:  # fmt: skip
        result = recurrent(query, key, value, decay=decay, beta=beta, state=state, cu_seqlens=cu_seqlens)
        if cu_seqlens is not None:
            cu_seqlens[-1] += 1
        return result

    assert failures("gated_delta_rule", step, differentiable=False) == {None, *changed("state")}
    assert failures("gated_delta_rule", grows, differentiable=False) == {None, *changed("cu_seqlens")}


def test_indices_and_several_arguments() -> None:
    def sorts(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        y = loop_experts(hidden, gate_up, down, indices, weights)
        indices.copy_(indices.sort(-1).values)
        return y

    def both(hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        y = sorts(hidden, gate_up, down, indices, weights)
        weights.zero_()
        return y

    backends.add_cases("experts", loop_experts, expert_cases)
    assert failures("experts", sorts) == changed("indices")
    assert failures("experts", both, differentiable=False) == changed("indices, weights")


def test_tensors_in_a_tuple() -> None:
    def takes_a_pair(pair: tuple[Tensor, Tensor], weight: Tensor, *, eps: float) -> Tensor:
        return pair[0] * weight + eps * pair[1]

    def spoils(pair: tuple[Tensor, Tensor], weight: Tensor, *, eps: float) -> Tensor:
        y = takes_a_pair(pair, weight, eps=eps)
        pair[1].detach().zero_()
        return y

    def cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Iterator[tuple[tuple, dict]]:
        draw = torch.randn(3, 2, 5, generator=generator).to(device, dtype)
        yield ((draw[0], draw[1]), draw[2, 0]), {"eps": 0.5}

    from qwen35moe.backends.verification import compare

    for fn, expected in ((takes_a_pair, {None}), (spoils, changed("pair"))):
        entry = backends.Implementation("rms_norm", "mine", fn, differentiable=True)
        assert {row.failure for row in compare("rms_norm", [entry], takes_a_pair, cases, torch.float32, "cpu", 0)} == expected
