"""The adapter to sonic-moe, with a stand-in of the signature and checks of the source of 0.1.2.post1 (see
docs/reference/adapters.md). 0.1.2 is the first release with `concat_layout`.

The stand-in computes with our definition. It does not show the package's own arithmetic.
"""

from __future__ import annotations

import enum
import importlib.machinery
import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from qwen35moe import backends, ops
from qwen35moe.backends.operation import TABLE
from tests.support.kernel_checks import assert_close, draw, refusal
from tests.support.stand_ins import received, require, require_aligned

loop_experts = ops.experts.definition

STREAM = 7
BF16 = torch.bfloat16


class ActivationType(enum.Enum):
    SWIGLU = "swiglu"
    GEGLU = "geglu"


def moe_general_routing_inputs(
    x: Tensor, router_scores: Tensor, token_indices: Tensor, expert_indices: Tensor, w1: Tensor, b1: Tensor | None,
    w2: Tensor, b2: Tensor | None, E: int, stream_id: int, activation_type: ActivationType,
    is_inference_mode_enabled: bool = False, concat_layout: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """In the package's letters: x [T, H], router_scores, token_indices and expert_indices [TK], w1 [2I, H, E], w2 [H, I, E];
    returns o [T, H] and the number of assignments per expert. Tokens may have different numbers of assignments."""
    require(not torch.compiler.is_compiling(), "assert not torch.compiler.is_compiling()", AssertionError)
    require((b1 is None) == (b2 is None), "b1 and b2 has to be None or not None at the same time!", AssertionError)
    require(b1 is None and b2 is None and activation_type == ActivationType.SWIGLU, "not in this stand-in")
    require(x.dtype in (torch.bfloat16, torch.float16) and x.dtype == w1.dtype == w2.dtype, "bfloat16 or float16")
    require(x.is_contiguous() and router_scores.is_contiguous(), "x and router_scores contiguous")
    require_aligned(x, w1.permute(2, 0, 1), w2.permute(2, 0, 1))
    require(router_scores.numel() * x.shape[1] < 1 << 32, "offsets of its sum over experts are uint32")
    router_scores = router_scores.float()
    require(token_indices.dtype == expert_indices.dtype == torch.int32, "int32 indices")
    require(bool((token_indices.diff() >= 0).all()), "token_indices is already SORTED ascendingly")
    require(len(token_indices) == len(expert_indices) == len(router_scores) > 0, "one length")
    for weight in (w1, w2):
        require(weight.permute(2, 0, 1).is_contiguous(), "stride order (2, 0, 1)")
        require(all(size % 8 == 0 for size in weight.shape[:2]), "16 bytes")
    require(w1.shape == (2 * w2.shape[1], w2.shape[0], E) and w2.shape[2] == E, "w1 (2I, H, E), w2 (H, I, E)")
    require(stream_id == STREAM, "the current stream")
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (x, router_scores, w1, w2))
    require(not (gradient and is_inference_mode_enabled), "h was not kept for the backward", AttributeError)
    gate_up = w1.permute(2, 0, 1)
    if not concat_layout:  # rows of gate and up alternate
        gate_up = torch.cat([gate_up[:, ::2], gate_up[:, 1::2]], dim=1)
    rows = loop_experts(x[token_indices.long()], gate_up, w2.permute(2, 0, 1), expert_indices.long()[:, None],
                        torch.ones_like(router_scores)[:, None])  # fmt: skip
    out = torch.zeros_like(x, dtype=torch.float32).index_add(0, token_indices.long(), rows.float() * router_scores[:, None])

    def check(dout: Tensor) -> None:
        require(dout.is_contiguous(), "one of the last two strides must be 1")
        require_aligned(dout)

    return received(out.to(x.dtype), check), torch.bincount(expert_indices, minlength=E).int()


@contextmanager
def installed(version: str = "0.1.2.post1") -> Iterator[ModuleType]:
    """Installs the stand-in and registers the adapter again, as on a machine with a GPU; the adapter takes CPU tensors."""
    from qwen35moe_kernels import runtime, sonic_moe

    modules = {name: ModuleType(name) for name in ("sonicmoe", "sonicmoe.enums", "sonicmoe.functional")}
    modules["sonicmoe"].__spec__ = importlib.machinery.ModuleSpec("sonicmoe", None)
    vars(modules["sonicmoe.enums"])["ActivationType"] = ActivationType
    vars(modules["sonicmoe.functional"])["moe_general_routing_inputs"] = moe_general_routing_inputs
    known, before = importlib.metadata.version, backends.implementations("experts")
    with ExitStack() as stack:
        stack.callback(lambda: TABLE["experts"].assign(before))
        stack.enter_context(mock.patch.dict(sys.modules, modules))
        stack.enter_context(
            mock.patch.object(importlib.metadata, "version", lambda name: version if name == "sonic-moe" else known(name))
        )
        backends.unregister("experts", "sonic_moe")
        with mock.patch.object(torch.cuda, "is_available", lambda: True):
            sonic_moe.register(backends.register)
        stack.enter_context(mock.patch.object(runtime, "unsupported_cuda", lambda **tensors: None))
        stream = SimpleNamespace(cuda_stream=STREAM)
        stack.enter_context(mock.patch.object(torch.cuda, "current_stream", lambda device: stream))
        yield modules["sonicmoe.functional"]


@pytest.fixture
def sonic() -> Iterator[ModuleType]:
    with installed() as module:
        yield module


def problem(tokens: int = 9, top_k: int = 2, experts: int = 3, width: int = 16, inner: int = 8) -> tuple[Tensor, ...]:
    tensors = draw(tokens, width), draw(experts, 2 * inner, width, seed=1), draw(experts, width, inner, seed=2)
    indices = draw(tokens, experts, seed=3).topk(top_k, dim=-1).indices
    weights = draw(tokens, top_k, seed=4).softmax(-1)
    return *(x.to(BF16) for x in tensors), indices, weights.to(BF16)


@pytest.mark.usefixtures("sonic")
@pytest.mark.parametrize("size", [(9, 2, 3, 16, 8), (1, 3, 5, 24, 16)], ids=str)
def test_forward_and_backward(size: tuple[int, ...]) -> None:
    args = problem(*size)
    assert_close("experts", "sonic_moe", args, {}, BF16, forward=2**-6, backward=2**-5)
    assert_close("experts", "sonic_moe", (*args[:4], args[4].float()), {}, BF16, forward=2**-6, backward=2**-5)
    repeated = args[3].clone()
    repeated[:, -1] = repeated[:, 0]
    assert_close("experts", "sonic_moe", (*args[:3], repeated, args[4]), {}, BF16, forward=2**-6, backward=2**-5)


@pytest.mark.usefixtures("sonic")
def test_views_that_are_not_aligned() -> None:
    hidden, gate_up, down, indices, weights = problem()
    shifted = hidden.new_zeros(9, 19)[:, 3:].copy_(hidden)
    row = hidden.new_zeros(19)[3:].copy_(hidden[0])[None]  # contiguous, but misaligned
    for x, n in ((shifted, 9), (row, 1)):
        args = (x, gate_up, down, indices[:n], weights[:n])
        assert_close("experts", "sonic_moe", args, {}, BF16, forward=2**-6, backward=2**-5)
    moved = gate_up.new_zeros(gate_up.numel() + 3)[3:].view(gate_up.shape)
    reason = refusal("experts", "sonic_moe", hidden, moved, down, indices, weights)
    assert reason == "gate_up begins at element 3 of its storage, sonic-moe takes multiples of 8"
    leaf = hidden.clone().requires_grad_()
    with backends.use(experts="sonic_moe"):
        out = backends.run("experts", leaf, gate_up, down, indices, weights)
    out.sum().backward()  # the gradient is an expanded scalar
    assert leaf.grad is not None


def test_auto_takes_it_for_many_assignments_and_it_keeps_nothing_without_a_gradient(sonic: ModuleType, calls) -> None:
    many, few = problem(tokens=96), problem(tokens=95)
    with backends.ran() as ran, calls(sonic, "moe_general_routing_inputs") as recorded:
        backends.run("experts", *many)
        backends.run("experts", many[0].requires_grad_(), *many[1:])
        backends.run("experts", *few)
    assert [call.name for call in ran.calls] == ["sonic_moe", "sonic_moe", "gathered"]
    assert [options["is_inference_mode_enabled"] for _, options in recorded.arguments] == [True, False]
    with backends.use(experts="sonic_moe"), backends.ran() as ran:
        backends.run("experts", *few)
    assert ran.counts == {("experts", "sonic_moe"): 1}


@pytest.mark.usefixtures("sonic")
def test_unsupported_names_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, gate_up, down, indices, weights = problem()

    def reason(*args: Any, **options: Any) -> str | None:
        return refusal("experts", "sonic_moe", *args, **options)

    assert reason(hidden, gate_up, down, indices, weights) is None
    tapped = reason(hidden, gate_up, down, indices, weights, tap=print)
    assert tapped.startswith("a tap reads expert_in, expert_act or expert_out, which this implementation")
    assert reason(hidden.float(), gate_up, down, indices, weights) == "hidden is float32, not one of bfloat16, float16"
    assert "down torch.float16, sonic-moe takes one dtype" in reason(hidden, gate_up, down.half(), indices, weights)
    assert reason(hidden, gate_up.mT.contiguous().mT, down, indices, weights).startswith("gate_up is not contiguous")
    assert reason(*problem(tokens=0)) == "indices is empty"
    assert reason(*problem(width=20)) == "hidden has rows of 20, sonic-moe takes multiples of 8 (16 bytes)"
    assert reason(*problem(inner=12)) == "down has rows of 12, sonic-moe takes multiples of 8 (16 bytes)"
    many = reason(hidden, gate_up, down, indices[:1].expand(1 << 27, 2), weights)
    assert many == "268435456 assignments of 16 numbers, sonic-moe indexes fewer than 2^32"
    wide = indices.repeat(1, 2)
    assert reason(hidden, gate_up, down, wide, weights.repeat(1, 2)).startswith("indices has top_k 4 for 3 experts")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_deterministic_algorithms_warn_only_enabled", lambda: False)
        assert reason(hidden, gate_up, down, indices, weights).startswith("deterministic algorithms are enabled")
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert reason(hidden, gate_up, down, indices, weights) == "a graph is being compiled, which sonic-moe does not support"
    older, newer = "sonic-moe supports compute capability 9.0", "can be silently wrong (its issue 63)"
    for capability, words in (((8, 0), older), ((10, 3), newer)):
        monkeypatch.setattr("qwen35moe_kernels.runtime.capability", lambda tensor, value=capability: value)
        assert words in reason(hidden, gate_up, down, indices, weights)
    monkeypatch.setattr("qwen35moe_kernels.runtime.capability", lambda tensor: (9, 0))
    assert reason(hidden, gate_up, down, indices, weights) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")  # an MI300 is 9.4
    assert reason(hidden, gate_up, down, indices, weights) == "sonic-moe supports NVIDIA's GPUs only"


def test_a_missing_or_old_package_is_reported() -> None:
    args = problem()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"sonicmoe is not installed|hidden is on cpu, not on CUDA"):
            with backends.use(experts="sonic_moe"):
                backends.run("experts", *args)
    with installed("0.1.1"):
        assert "sonic-moe 0.1.1 is installed, 0.1.2 or newer is needed" in refusal("experts", "sonic_moe", *args)


@pytest.mark.gpu
def test_the_package_itself_against_the_definition() -> None:
    pytest.importorskip("sonicmoe", reason="sonic-moe is not installed")
    report = backends.verify("sonic_moe", dtypes=(BF16,))
    assert report.ok, str(report)
    args = tuple(x.to("cuda") for x in problem(512, 4, 16, 256, 128))
    assert_close("experts", "sonic_moe", args, {}, BF16, forward=2**-7, backward=2**-6)
