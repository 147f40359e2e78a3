"""The Triton gated norm: shapes, dtypes, gradients, views; one operation when compiled."""

from __future__ import annotations

import pytest
import torch

from qwen35moe import backends
from tests.support.kernel_checks import DEVICE, DTYPES, ROUNDED, assert_close, draw, gradients, refusal

pytest.importorskip("triton")
OPERATION, EPS = "gated_rms_norm", {"eps": 1e-6}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    from qwen35moe_kernels import gated_norm

    for name, size in (("_ELEMENTS", 64), ("_ELEMENTS_BACKWARD", 32), ("_PROGRAMS", 3)):
        monkeypatch.setattr(gated_norm, name, size)
    with backends.use(gated_rms_norm="triton"):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 7, 24), (2, 65, 2, 8), (3, 130)], ids=str)
def test_every_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    args = draw(*shape, dtype=dtype), draw(*shape, seed=1, dtype=dtype), 1 + draw(shape[-1], seed=2)
    assert_close(OPERATION, "triton", args, EPS, dtype, forward=ROUNDED[dtype], backward=2 * ROUNDED[dtype])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # e^1000 is infinite, and 1 / (1 + e^1000) zero
def test_extreme_values() -> None:
    """A zero row stays zero; gates that saturate the sigmoid give finite values and gradients."""
    x, gate = draw(6, 12), 1e3 * draw(6, 12, seed=1)
    x[2] = 0
    assert_close(OPERATION, "triton", (x, gate, draw(12, seed=2)), EPS, torch.float32, forward=2e-6, backward=4e-6)
    assert not backends.run(OPERATION, x, gate, draw(12), **EPS)[2].any()


def test_views_and_the_recorded_implementation() -> None:
    wide = draw(4, 3, 20)
    x, gate, weight = wide[..., :8], wide[..., 8:16], draw(8, seed=1)
    with backends.ran() as ran:
        viewed = backends.run(OPERATION, x, gate, weight, **EPS)
    assert torch.equal(viewed, backends.run(OPERATION, x.contiguous(), gate.contiguous(), weight, **EPS))
    assert ran.counts == {(OPERATION, "triton"): 1}


def test_one_operation_under_torch_compile() -> None:
    args = draw(7, 24), draw(7, 24, seed=1), draw(24, seed=2)

    def call(*args: torch.Tensor) -> torch.Tensor:
        return backends.run(OPERATION, *args, **EPS)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), call(*args))
    assert all(torch.equal(a, b) for a, b in zip(gradients(call, *args), gradients(compiled, *args), strict=True))
    torch.library.opcheck(
        torch.ops.qwen35moe_kernels.gated_rms_norm.default, (args[0].requires_grad_(), *args[1:], 1e-6),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


def test_unsupported_names_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = draw(2, 8), draw(8)
    assert refusal(OPERATION, "triton", x, x, weight, **EPS) is None
    assert refusal(OPERATION, "triton", x, x.double(), weight, **EPS).startswith("gate is float64, not one of")
    assert refusal(OPERATION, "triton", x, x[:1], weight, **EPS) == "gate [1, 8] would be broadcast over x [2, 8]"
    long = draw(1, 8193)
    assert refusal(OPERATION, "triton", long, long, long[0], **EPS) == "x has rows of 8193, one program holds 8192"
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        assert refusal(OPERATION, "triton", x, x, weight, **EPS) == "x is on cpu, not on CUDA"
