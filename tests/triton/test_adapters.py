"""The adapters to causal_conv1d and flash-attn, with stand-ins that reject what the packages reject.

Forward and backward against the definitions, which implementation ran, errors of a forced choice, every unsupported reason.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe import backends, ops
from tests.support.kernel_checks import assert_close, draw, integers, refusal
from tests.support.stand_ins import installed

BF16 = torch.bfloat16
BOUND = {"forward": 2**-7, "backward": 2**-6}


@pytest.fixture
def conv() -> Iterator[ModuleType]:
    with installed("causal_conv1d", ("short_convolution",)) as module:
        yield module


@pytest.fixture
def flash() -> Iterator[ModuleType]:
    with installed("flash_attn", ("attention", "vision_attention")) as module:
        yield module


# ---------------------------------------------------------------------------------------------------------- causal_conv1d


@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("tokens", [1, 2, 7, 65])
@pytest.mark.parametrize("form", ["plain", "state", "lengths"])
@pytest.mark.usefixtures("conv")
def test_convolution_forward_and_backward(form: str, tokens: int, taps: int) -> None:
    options: dict[str, Any] = {} if form == "plain" else {"state": draw(3, 16, taps - 1, seed=2)}
    if form == "lengths":
        options["lengths"] = integers(tokens, min(1, tokens), tokens)
        if tokens > 1:  # past a length only the definition returns zeros
            x, weight = draw(3, tokens, 16), draw(16, taps, seed=1)
            with backends.use(short_convolution="causal_conv1d"):
                y, after = backends.run("short_convolution", x, weight, **options)
            with backends.use(short_convolution="direct"):
                expected, last = backends.run("short_convolution", x, weight, **options)
            assert torch.equal(after, last)
            for row, length in enumerate(options["lengths"].tolist()):
                assert (y[row, :length] - expected[row, :length]).abs().max() < 1e-5
            return
    args = draw(3, tokens, 16), draw(16, taps, seed=1)
    assert_close("short_convolution", "causal_conv1d", args, options, torch.float32, forward=1e-6, backward=3e-6)


@pytest.mark.parametrize("lengths", [[1, 3, 4], [63, 64, 65, 1]], ids=str)
@pytest.mark.usefixtures("conv")
def test_convolution_of_packed_documents(lengths: list[int]) -> None:
    bounds = integers(0, *(sum(lengths[: i + 1]) for i in range(len(lengths))))
    args = draw(1, sum(lengths), 16), draw(16, 4, seed=1)
    options = {"cu_seqlens": bounds}
    assert_close("short_convolution", "causal_conv1d", args, options, torch.float32, forward=1e-6, backward=3e-6)


@pytest.mark.usefixtures("conv")
def test_one_token_in_bfloat16_leaves_the_state_unchanged() -> None:
    args, state = (draw(2, 1, 8, dtype=BF16), draw(8, 4, seed=1, dtype=BF16)), draw(2, 8, 3, seed=2, dtype=BF16)
    before = state.clone()
    with backends.ran() as ran:
        y, after = backends.run("short_convolution", *args, state=state)
    assert ran.counts == {("short_convolution", "causal_conv1d"): 1}
    assert torch.equal(state, before) and torch.equal(after, torch.cat([state, args[0].mT], dim=-1)[..., 1:])
    assert_close("short_convolution", "causal_conv1d", args, {"state": state}, BF16, **BOUND)
    with backends.use(short_convolution="direct"):
        assert torch.equal(y, backends.run("short_convolution", *args, state=state)[0])


def test_one_token_goes_through_update_and_more_through_fn(conv: ModuleType, calls) -> None:
    weight = draw(8, 4)
    with calls(conv, "causal_conv1d_update") as updates, calls(conv, "causal_conv1d_fn") as others:
        backends.run("short_convolution", draw(2, 1, 8), weight)
        backends.run("short_convolution", draw(2, 1, 8).requires_grad_(), weight)  # update has no backward
        backends.run("short_convolution", draw(2, 3, 8), weight)
    assert (updates.count, others.count) == (1, 2)


def misaligned(x: Tensor) -> Tensor:
    """A view of the same values that begins inside a 16-byte word, in rows that are a few elements longer."""
    wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + 5)
    return wide[..., 5:].copy_(x)


@pytest.mark.usefixtures("conv")
@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("taps", [2, 4])
def test_convolution_of_misaligned_views(tokens: int, taps: int) -> None:
    """The package checks strides of dimensions of size 1 as well, and its kernels read 16 bytes at a time."""
    for batch in (1, 3):
        x, weight, state = draw(batch, tokens, 16), draw(16, taps, seed=1), draw(batch, taps - 1, 16, seed=2)
        options = {"state": misaligned(state).mT, "lengths": integers(*[tokens] * batch)}
        assert_close("short_convolution", "causal_conv1d", (misaligned(x), weight), options, torch.float32, forward=1e-6)
    x = draw(1, 16, 1).mT  # strides 16, 1, 1
    options = {"cu_seqlens": integers(0, 1)}
    assert_close("short_convolution", "causal_conv1d", (x, weight), options, torch.float32, forward=1e-6, backward=3e-6)


@pytest.mark.usefixtures("conv")
@pytest.mark.parametrize("layout", ["expanded", "slice", "transposed"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_gradient_of_any_layout_reaches_the_convolution(layout: str, tokens: int) -> None:
    x, weight = draw(2, tokens, 16).requires_grad_(), draw(16, 4, seed=1)
    gradient = {
        "expanded": torch.ones(()).expand(2, tokens, 16),
        "slice": misaligned(draw(2, tokens, 16, seed=3)),
        "transposed": draw(2, 16, tokens, seed=3).mT,
    }[layout]
    results = []
    for name in ("causal_conv1d", "direct"):
        with backends.use(short_convolution=name):
            y, _ = backends.run("short_convolution", x, weight)
        results.append(torch.autograd.grad(y, x, gradient)[0])
    assert (results[0] - results[1]).abs().max() <= 3e-6 * results[1].abs().max()


@pytest.mark.parametrize("version", ["1.6.2.post1", "1.7.0"])
def test_packed_documents_in_both_versions(version: str) -> None:
    """Before 1.7 the kernel reads past seq_idx, and refuses an initial state beside it."""
    with installed("causal_conv1d", ("short_convolution",), version):
        args, bounds = (draw(1, 130, 16), draw(16, 4, seed=1)), integers(0, 65, 65, 66, 130)
        options = {"cu_seqlens": bounds}
        assert_close("short_convolution", "causal_conv1d", args, options, torch.float32, forward=1e-6, backward=3e-6)


def test_versions_of_causal_conv1d(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen35moe_kernels import causal_conv1d

    x, weight = draw(1, 6, 8).requires_grad_(), draw(8, 4)
    monkeypatch.setattr(torch, "is_deterministic_algorithms_warn_only_enabled", lambda: False)
    for version, words in (("1.5.3.post1", "before 1.6 sums the gradient of weight atomically"), ("1.6.0", None)):
        with installed("causal_conv1d", ("short_convolution",), version):
            causal_conv1d._sums_atomically.cache_clear()
            reason = refusal("short_convolution", "causal_conv1d", x, weight)
            assert reason is None if words is None else words in (reason or "")
            assert refusal("short_convolution", "causal_conv1d", x.detach(), weight) is None
    causal_conv1d._sums_atomically.cache_clear()
    if importlib.util.find_spec("causal_conv1d") is None:
        assert not causal_conv1d._sums_atomically()
        causal_conv1d._sums_atomically.cache_clear()
    with installed("causal_conv1d", ("short_convolution",), "1.3.0"):
        old = refusal("short_convolution", "causal_conv1d", x.detach(), weight)
    assert (old or "").startswith("causal-conv1d 1.3.0 is installed, 1.4 or newer is needed")


@pytest.mark.usefixtures("conv")
def test_convolution_unsupported() -> None:
    def reason(x: Tensor, weight: Tensor, **options: Any) -> str | None:
        return refusal("short_convolution", "causal_conv1d", x, weight, **options)

    x, weight, bounds = draw(1, 6, 8), draw(8, 4), integers(0, 2, 6)
    assert reason(x, weight) is None
    assert reason(x, draw(8, 5)) == "weight has 5 taps, causal_conv1d takes 2 to 4"
    assert reason(x, draw(8, 1)) == "weight has 1 taps, causal_conv1d takes 2 to 4"
    assert reason(draw(1, 6, 12), draw(12, 4)) == "x has 12 channels, causal_conv1d takes multiples of 8"
    assert reason(x.double(), weight) == "x is float64, not one of float32, bfloat16, float16"
    assert reason(draw(2, 0, 8), weight) == "x [2, 0, 8] is empty"
    huge = reason(x[:, :1].expand(1, 1 << 29, 8), weight)
    assert huge == "x has 4294967296 elements, causal_conv1d indexes fewer than 2^32"
    packed = reason(x, weight, cu_seqlens=bounds, state=draw(2, 8, 3))
    assert packed == "state: causal_conv1d takes no initial state for packed documents (cu_seqlens)"
    with backends.use(short_convolution="causal_conv1d"), pytest.raises(ValueError, match="cannot run .* 5 taps"):
        backends.run("short_convolution", x, draw(8, 5))
    with backends.ran() as ran:  # auto takes the next
        backends.run("short_convolution", x, draw(8, 5))
    assert {name for _, name in ran.counts} != {"causal_conv1d"}


# -------------------------------------------------------------------------------------------------------------- flash_attn


def attention_case(batch: int, tokens: int, positions: int, starts: Any, bounds: Tensor | None = None, width: int = 16):
    shapes = ((tokens, 6), (positions, 2), (positions, 2))
    args = tuple(draw(batch, *shape, width, seed=i, dtype=BF16) for i, shape in enumerate(shapes))
    return args, {"scale": width**-0.5, "starts": starts, "cu_seqlens": bounds}


@pytest.mark.parametrize("tokens", [1, 3, 65])
@pytest.mark.parametrize("start,unused", [(0, 0), (9, 0), (0, 5), (9, 5)])
@pytest.mark.usefixtures("flash")
def test_attention_forward_and_backward(tokens: int, start: int, unused: int) -> None:
    """From position 0 or a later one, with and without unused positions at the end of key."""
    args, options = attention_case(2, tokens, start + tokens + unused, start)
    assert_close("attention", "flash_attn", args, options, BF16, **BOUND)


@pytest.mark.usefixtures("flash")
def test_attention_of_packed_documents_and_heads_of_256() -> None:
    args, options = attention_case(1, 12, 12, 0, integers(0, 1, 4, 12))
    assert_close("attention", "flash_attn", args, options, BF16, **BOUND)
    args, options = attention_case(1, 5, 5, 0, width=256)
    assert_close("attention", "flash_attn", args, options, BF16, **BOUND)


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("start", [0, 4])
def test_attention_of_misaligned_views(start: int) -> None:
    """flash-attn copies 16 bytes at a time and does not check that it may."""
    args, options = attention_case(2, 3, 3 + start, start)
    assert_close("attention", "flash_attn", tuple(misaligned(x) for x in args), options, BF16, **BOUND)
    views = tuple(x.mT.contiguous().mT for x in args)  # the last dimension is not contiguous
    assert_close("attention", "flash_attn", views, options, BF16, **BOUND)
    query = args[0].clone().requires_grad_()
    gradient, results = misaligned(draw(2, 3, 6, 16, seed=7, dtype=BF16)), []
    for name in ("flash_attn", "eager"):
        with backends.use(attention=name):
            out = backends.run("attention", query, *args[1:], **options)
        results.append(torch.autograd.grad(out, query, gradient)[0])
    assert (results[0] - results[1]).abs().max() <= 2**-6 * results[1].abs().max()


@pytest.mark.usefixtures("flash")
def test_documents_of_one_token_beside_an_empty_one() -> None:
    """With a longest length of 1 and grouped heads, flash-attn reshapes the query to one row per document."""
    args, options = attention_case(1, 2, 2, 0, integers(0, 1, 1, 2))
    assert_close("attention", "flash_attn", args, options, BF16, **BOUND)
    strided = torch.stack([integers(0, 1, 2), integers(9, 9, 9)], dim=1).int()[:, 0]
    args, options = attention_case(1, 2, 2, 0, strided)
    assert_close("attention", "flash_attn", args, options, BF16, **BOUND)


def test_which_function_of_flash_attn_runs(flash: ModuleType, calls) -> None:
    def ran(args: tuple[Tensor, ...], options: dict[str, Any], name: str) -> dict[str, Any]:
        with calls(flash, name) as recorded, backends.ran() as record:
            out = backends.run("attention", *args, **options)
        assert recorded.count == 1 and record.counts == {("attention", "flash_attn"): 1}
        with backends.use(attention="eager"):
            expected = backends.run("attention", *args, **options)
        assert (out - expected).abs().max() <= 2**-7 * expected.abs().max()
        return recorded.arguments[0][1]

    assert ran(*attention_case(2, 4, 4, 0), "flash_attn_func")["causal"] is True
    assert ran(*attention_case(2, 1, 9, 6), "flash_attn_with_kvcache")["cache_seqlens"] == 7
    ragged = ran(*attention_case(2, 3, 9, integers(6, 2)), "flash_attn_with_kvcache")
    assert ragged["cache_seqlens"].tolist() == [9, 5]
    ran(*attention_case(1, 7, 7, 0, integers(0, 3, 7)), "flash_attn_varlen_func")
    args, options = attention_case(2, 2, 9, 6)
    with calls(flash, "flash_attn_func") as recorded:  # the function for a cache has no backward
        backends.run("attention", args[0].requires_grad_(), *args[1:], **options)
    assert recorded.count == 1 and recorded.arguments[0][0][1].shape[1] == 8


def test_dropout_and_determinism_are_passed_on(flash: ModuleType, calls) -> None:
    args, options = attention_case(2, 4, 4, 0)
    with calls(flash, "flash_attn_func") as recorded:
        backends.run("attention", *args, **options, dropout=0.25)
        torch.use_deterministic_algorithms(False)
        try:
            backends.run("attention", *args, **options)
        finally:
            torch.use_deterministic_algorithms(True, warn_only=True)
    (_, first), (_, second) = recorded.arguments
    assert (first["dropout_p"], first["deterministic"]) == (0.25, True)
    assert (second["dropout_p"], second["deterministic"]) == (0.0, False)


@pytest.mark.usefixtures("flash")
def test_vision_frames() -> None:
    args = tuple(draw(13, 3, 24, seed=i, dtype=BF16) for i in range(3))
    options = {"cu_seqlens": integers(0, 4, 5, 13), "scale": 0.3}
    assert_close("vision_attention", "flash_attn", args, options, BF16, **BOUND)
    with backends.ran() as ran:
        backends.run("vision_attention", *args, **options)
    assert ran.counts == {("vision_attention", "flash_attn"): 1}
    single = tuple(x.float() for x in args)
    assert refusal("vision_attention", "flash_attn", *single, **options) == "query is float32, not one of float16, bfloat16"


@pytest.mark.usefixtures("flash")
def test_attention_unsupported() -> None:
    def reason(case: Any, **more: Any) -> str:
        text = refusal("attention", "flash_attn", *case[0], **(case[1] | more))
        assert text is not None
        return text

    case = attention_case(2, 3, 9, 6)
    args, options = case
    assert reason((tuple(x.float() for x in args), options)) == "query is float32, not one of float16, bfloat16"
    assert reason((args[:2] + (args[2].half(),), options)).endswith("flash_attn takes one dtype")
    assert reason((args[:2] + (args[2][..., :8],), options)).startswith("value has heads of 8 and query of 16")
    assert reason(attention_case(1, 3, 3, 0, width=264)) == "query has heads of 264, flash_attn takes up to 256"
    assert reason(attention_case(1, 3, 3, 0, width=12)) == "query has heads of 12, flash_attn takes multiples of 8"
    assert reason(attention_case(2, 0, 3, 0)) == "query [2, 0, 6, 16] is empty"
    beyond = reason((args, options | {"starts": 7}))
    assert beyond == "starts 7: 3 more tokens do not fit into the 9 positions of key"
    ragged = (args, options | {"starts": integers(6, 2)})
    assert reason(ragged, dropout=0.1).startswith("dropout 0.1: not supported for rows that start at different positions")
    trained = (args[0].clone().requires_grad_(), *args[1:]), ragged[1]
    assert reason(trained).startswith("starts: rows that start at different positions have no backward")
    with backends.use(attention="flash_attn"), pytest.raises(ValueError, match="cannot run attention: starts"):
        backends.run("attention", *trained[0], **trained[1])
    packed = attention_case(2, 7, 7, 0, integers(0, 3, 7))
    assert reason(packed).startswith("cu_seqlens: query [2, 7, 6, 16]")
    assert reason((args[:1] + tuple(x[:, :, :1].expand(-1, -1, 4, -1) for x in args[1:]), options)).startswith("query has 6")


@pytest.mark.usefixtures("flash")
def test_verify_reports_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output is right and one gradient is wrong: `verify` checks both."""
    correct = sys.modules["flash_attn"].flash_attn_func

    def wrong(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return correct(q, k, 1.5 * v - 0.5 * v.detach(), **options)

    assert backends.verify("flash_attn", dtypes=(BF16,)).ok
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_func", wrong)
    report = backends.verify("flash_attn", dtypes=(BF16,))
    assert not report.ok and "FAILED" in str(report)
    assert all(row.forward <= row.bounds[0] for row in report.ran)


# ---------------------------------------------------------------------------------------------------- missing, unsupported


def test_a_missing_package_names_the_command_that_installs_it() -> None:
    for operation, name, how in (
        ("short_convolution", "causal_conv1d", "causal_conv1d is not installed: pip install causal-conv1d"),
        ("attention", "flash_attn", "flash_attn is not installed: pip install 'flash-attn>=2.6' --no-build-isolation"),
    ):
        implementation = next(entry for entry in backends.implementations(operation) if entry.name == name)
        if implementation.missing != how:
            pytest.skip(f"{name} is installed here")
        assert how in backends.describe(operation)


def test_missing_without_a_gpu_with_an_old_version_and_with_flash_attn_4_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen35moe_kernels import flash_attn, runtime

    monkeypatch.setattr(runtime, "installed", lambda package: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert flash_attn._missing() == "there is no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.5.8")
    assert flash_attn._missing().startswith("flash-attn 2.5.8 is installed, 2.6 or newer is needed")

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert flash_attn._missing().startswith("flash_attn is installed without the distribution flash-attn")


def test_cpu_tensors_and_old_gpus_are_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen35moe_kernels import causal_conv1d, flash_attn, runtime

    x, weight = torch.zeros(1, 3, 8), torch.zeros(8, 4)
    assert causal_conv1d.unsupported(x, weight) == "x is on cpu, not on CUDA"
    q = torch.zeros(1, 3, 2, 16, dtype=BF16)
    options: dict[str, Any] = {"scale": 1.0}
    assert flash_attn.attention_unsupported(q, q, q, **options) == "query is on cpu, not on CUDA"
    monkeypatch.setattr(runtime, "unsupported_cuda", lambda **tensors: None)
    monkeypatch.setattr(runtime, "capability", lambda tensor: (7, 5))
    old = flash_attn.attention_unsupported(q, q, q, **options)
    assert old == "flash_attn needs compute capability 8.0, cpu has 7.5"
    monkeypatch.setattr(runtime, "capability", lambda tensor: (8, 9))
    wide = torch.zeros(1, 3, 2, 256, dtype=BF16, requires_grad=True)
    assert flash_attn.attention_unsupported(wide, wide, wide, **options) is None
    dropped = flash_attn.attention_unsupported(wide, wide, wide, **options, dropout=0.1)
    assert dropped == "dropout 0.1: heads of 256 have no backward with dropout on capability (8, 9)"


def test_the_attention_adapter_takes_every_argument_of_the_definition() -> None:
    """A further argument would be a mask that the adapter silently ignores."""
    from qwen35moe_kernels import flash_attn

    parameters = [inspect.signature(f).parameters for f in (flash_attn.attention, flash_attn.attention_unsupported)]
    assert parameters[0].keys() == parameters[1].keys() == inspect.signature(ops.attention.definition).parameters.keys()
