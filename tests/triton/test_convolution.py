"""The Triton convolution: every length, state, padding, packed documents, dtypes, gradients; one operation when compiled.

Blocks are small, so that short inputs span several; the interpreter's time grows with the number of programs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qwen35moe import backends, ops
from tests.support.kernel_checks import DEVICE, DTYPES, ROUNDED, assert_close, draw, gradients, integers, refusal
from tests.support.peer import relative_error

pytest.importorskip("triton")
CUTS = [1, 3, 4, 63, 64, 65, 129]
B, C, W = 2, 10, 4
OPERATION = "short_convolution"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from qwen35moe_kernels import convolution

    for name, size in (("_TOKENS", 32), ("_TOKENS_BACKWARD", 32), ("_CHANNELS", 16), ("_PARTS", 2 * B)):
        monkeypatch.setattr(convolution, name, size)
    with backends.use(short_convolution="triton"):
        yield


def close(args: tuple[Tensor, ...], options: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    forward = ROUNDED[dtype]
    assert_close(OPERATION, "triton", args, options, dtype, forward=forward, backward=2 * forward)


@pytest.mark.parametrize("tokens", CUTS)
def test_every_length_from_a_state(tokens: int) -> None:
    close((draw(B, tokens, C), draw(C, W, seed=1)), {"state": draw(B, C, W - 1, seed=2)})


def test_several_blocks_of_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen35moe_kernels.convolution._CHANNELS", 4)
    close((draw(B, 5, C), draw(C, W, seed=1)), {"state": draw(B, C, W - 1, seed=2)})
    close((draw(B, 1, C), draw(C, W, seed=1)), {"state": draw(B, C, W - 1, seed=2)})


@pytest.mark.parametrize("taps", [1, 2, 5])
def test_other_filter_widths_and_no_state(taps: int) -> None:
    close((draw(B, 18, C), draw(C, taps, seed=1)), {})
    close((draw(3, 1, C), draw(C, taps, seed=1)), {"state": draw(3, C, taps - 1, seed=2)})


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("tokens", [1, 18])
def test_half_precisions_are_rounded_once(tokens: int, dtype: torch.dtype) -> None:
    args = draw(B, tokens, C, dtype=dtype), draw(C, W, seed=1, dtype=dtype)
    close(args, {"state": draw(B, C, W - 1, seed=2, dtype=dtype)}, dtype)
    close((args[0], args[1].float()), {"state": draw(B, C, W - 1, seed=2, dtype=dtype)}, dtype)


@pytest.mark.parametrize("lengths", [[1, 3, 4], [20, 2, 1, 17]], ids=str)
@pytest.mark.parametrize("carried", [True, False], ids=["state", "no state"])
def test_packed_documents(carried: bool, lengths: list[int]) -> None:
    bounds = integers(0, *itertools.accumulate(lengths))
    options = {"cu_seqlens": bounds} | ({"state": draw(len(lengths), C, W - 1, seed=2)} if carried else {})
    close((draw(1, sum(lengths), C), draw(C, W, seed=1)), options)
    x, weight = draw(1, sum(lengths), C), draw(C, W, seed=1)
    outputs = [backends.run(OPERATION, x, weight, **options | {"cu_seqlens": b})[0] for b in (bounds, bounds.int())]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("lengths", [[19, 1, 2], [18, 19, 0]], ids=str)
@pytest.mark.parametrize("carried", [True, False], ids=["state", "no state"])
def test_right_padded_rows_and_padding_is_not_read(carried: bool, lengths: list[int]) -> None:
    x, weight, state = draw(3, 19, C), draw(C, W, seed=1), draw(3, C, W - 1, seed=2)
    options = {"lengths": integers(*lengths)} | ({"state": state} if carried else {})
    close((x, weight), options)
    nan_padded = x.clone()
    for row, length in enumerate(lengths):
        nan_padded[row, length:] = float("nan")
    ran = [backends.run(OPERATION, inputs, weight, **options) for inputs in (x, nan_padded)]
    assert all(torch.equal(one, other) for one, other in zip(*ran, strict=True))
    if carried:
        grads = [
            gradients(lambda y, w: backends.run(OPERATION, y, w, **options), inputs, weight) for inputs in (x, nan_padded)
        ]
        assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_states_are_slices_of_the_inputs_and_steps_equal_the_whole() -> None:
    x, weight = draw(B, 9, C), draw(C, W, seed=1)
    whole, end = backends.run(OPERATION, x, weight)
    assert torch.equal(end, x[:, -(W - 1) :].mT)
    steps, state = [], None
    for t in range(9):
        y, state = backends.run(OPERATION, x[:, t : t + 1], weight, state=state)
        steps.append(y)
    assert torch.equal(state, end)
    assert (torch.cat(steps, dim=1) - whole).abs().max() < 1e-6


def test_views_equal_contiguous_tensors() -> None:
    wide, weight = draw(B, 18, 3 * C), draw(C, W, seed=1)
    x, state = wide[..., C : 2 * C], draw(B, W - 1, C, seed=2).mT
    viewed = backends.run(OPERATION, x, weight, state=state)
    expected = backends.run(OPERATION, x.contiguous(), weight, state=state.contiguous())
    assert all(torch.equal(one, other) for one, other in zip(viewed, expected, strict=True))
    transposed = wide.mT.contiguous().mT[..., :C]
    expected = backends.run(OPERATION, transposed.contiguous(), weight)[0]
    assert torch.equal(backends.run(OPERATION, transposed, weight)[0], expected)


def test_forward_and_backward_launch_and_are_recorded(calls) -> None:
    from qwen35moe_kernels import convolution

    x, weight = draw(B, 5, C).requires_grad_(), draw(C, W, seed=1)
    with backends.ran() as ran, calls(convolution, "_Call") as launches:
        y, _ = backends.run(OPERATION, x, weight)
        y.sum().backward()
    assert ran.counts == {(OPERATION, "triton"): 1} and launches.count == 2


def test_one_operation_under_torch_compile() -> None:
    x, weight, state = draw(B, 18, C), draw(C, W, seed=1), draw(B, C, W - 1, seed=2)

    def call(*args: Tensor) -> tuple[Tensor, Tensor]:
        return backends.run(OPERATION, args[0], args[1], state=args[2])

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(x, weight, state), call(x, weight, state), strict=True))
    plain, whole = gradients(call, x, weight, state), gradients(compiled, x, weight, state)
    assert all(torch.equal(a, b) for a, b in zip(plain, whole, strict=True))
    torch.library.opcheck(
        torch.ops.qwen35moe_kernels.short_convolution.default, (x.requires_grad_(), weight, state, None, None),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


def test_second_derivatives_are_those_of_the_definition() -> None:
    x, weight = draw(1, 4, C).requires_grad_(), draw(C, W, seed=1).requires_grad_()
    second = []
    for function in (functools.partial(backends.run, OPERATION), ops.short_convolution.definition):
        y, _ = function(x, weight)
        first = torch.autograd.grad(y.square().sum(), (x, weight), create_graph=True)
        second.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), (x, weight)))
    for actual, expected in zip(*second, strict=True):
        assert relative_error(actual, expected) <= 1e-5


def test_unsupported_names_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = draw(1, 3, C), draw(C, W)
    assert refusal(OPERATION, "triton", x, weight) is None
    assert refusal(OPERATION, "triton", x.double(), weight) == "x is float64, not one of float32, bfloat16, float16"
    assert refusal(OPERATION, "triton", x, draw(C, 9)) == "weight has 9 taps, the kernels take up to 8"
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        assert refusal(OPERATION, "triton", x, weight) == "x is on cpu, not on CUDA"
        with pytest.raises(ValueError, match="backend='triton' cannot run short_convolution: x is on cpu, not on CUDA"):
            backends.run(OPERATION, x, weight)
