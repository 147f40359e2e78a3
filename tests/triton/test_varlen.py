"""The adapter to torch.nn.attention.varlen, with a stand-in that rejects what its kernels reject."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from qwen35moe import backends
from qwen35moe.backends.operation import TABLE
from qwen35moe_kernels import runtime, varlen
from tests.support.kernel_checks import assert_close, draw, integers, refusal
from tests.support.stand_ins import flash_attn_varlen_func

MODULE = pytest.importorskip("torch.nn.attention.varlen")
BF16 = torch.bfloat16
REAL = inspect.signature(MODULE.varlen_attn)


def stand_in(*arguments: Any, **options: Any) -> Tensor:
    """flash-attn's, which torch's calls; the arguments must fit the signature of this torch."""
    REAL.bind(*arguments, **options)
    assert len(arguments) == 7 and not options, "only these mean the same in all versions"
    return flash_attn_varlen_func(*arguments)


@pytest.fixture
def installed() -> Iterator[None]:
    """The adapter as on a machine with a GPU, taking tensors of the CPU."""
    before = backends.implementations("vision_attention")
    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        backends.unregister("vision_attention", "varlen")
        varlen.register(backends.register)
    with mock.patch.object(runtime, "unsupported_cuda", lambda **_: None), mock.patch.object(MODULE, "varlen_attn", stand_in):
        yield
    TABLE["vision_attention"].assign(before)


def frames(width: int = 24, dtype: torch.dtype = BF16) -> tuple[Tensor, ...]:
    query, key, value = draw(13, 3 * 3, width, dtype=dtype).unflatten(1, (3, 3)).unbind(1)
    return query.contiguous(), key.contiguous(), value  # as in the tower: the value is a slice of the projection


@pytest.mark.usefixtures("installed")
def test_frames_of_different_sizes_are_one_launch() -> None:
    args, options = frames(), {"cu_seqlens": integers(0, 4, 5, 13), "scale": 24**-0.5}
    assert_close("vision_attention", "varlen", args, options, BF16, forward=2**-7, backward=2**-6)
    for bounds, name in (((0, 4, 5, 13), "varlen"), ((0, 13), "torch")):
        with backends.ran() as ran:
            backends.run("vision_attention", *args, cu_seqlens=integers(*bounds), scale=24**-0.5)
        assert ran.calls[0].name == name


@pytest.mark.usefixtures("installed")
def test_unsupported() -> None:
    options: dict[str, Any] = {"cu_seqlens": integers(0, 4, 13), "scale": 24**-0.5}

    def reason(args: tuple[Tensor, ...], **more: Any) -> str:
        text = refusal("vision_attention", "varlen", *args, **(options | more))
        assert text is not None
        return text

    assert reason(frames(), scale=0.3).startswith("scale 0.3 is not K^-0.5 = 0.204124")
    assert reason(frames(20), scale=20**-0.5).startswith("query has heads of 20")
    assert reason(frames(dtype=torch.float32)) == "query is float32, not one of float16, bfloat16"
    assert reason((*frames()[:2], frames()[2].half())).endswith("varlen_attn takes one dtype")


def test_bounds_are_made_once_for_a_call_and_again_when_they_change() -> None:
    bounds = integers(0, 4, 5, 13)
    first = runtime.varlen_bounds(bounds, torch.device("cpu"))
    assert first[0].tolist() == [0, 4, 5, 13] and first[0].dtype == torch.int32 and first[1] == 8
    assert runtime.varlen_bounds(bounds, torch.device("cpu")) is first
    bounds[2] = 12
    assert runtime.varlen_bounds(bounds, torch.device("cpu"))[0].tolist() == [0, 4, 12, 13]
    assert runtime.varlen_bounds(integers(0, 1, 1), torch.device("cpu"))[1] == 2
