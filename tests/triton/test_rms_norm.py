"""The Triton RMS norm: shapes, dtypes, gradients, parts of wider rows; one operation when compiled."""

from __future__ import annotations

import pytest
import torch

from qwen35moe import backends
from tests.support.kernel_checks import DEVICE, DTYPES, ROUNDED, assert_close, draw, gradients, refusal

pytest.importorskip("triton")
OPERATION, EPS = "rms_norm", {"eps": 1e-6}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    from qwen35moe_kernels import norm

    for name, size in (("_ELEMENTS", 64), ("_ELEMENTS_BACKWARD", 32), ("_PROGRAMS", 3)):
        monkeypatch.setattr(norm, name, size)
    with backends.use(rms_norm="triton"):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 7, 24), (2, 65, 2, 8), (3, 130)], ids=str)
def test_every_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    args = draw(*shape, dtype=dtype), 0.3 * draw(shape[-1], seed=2)
    assert_close(OPERATION, "triton", args, EPS, dtype, forward=ROUNDED[dtype], backward=2 * ROUNDED[dtype])


def test_a_zero_row_and_no_rows() -> None:
    x, weight = draw(6, 12), draw(12, seed=2)
    x[2] = 0
    assert_close(OPERATION, "triton", (x, weight), EPS, torch.float32, forward=2e-6, backward=4e-6)
    assert not backends.run(OPERATION, x, weight, **EPS)[2].any()
    empty = x[:0].requires_grad_()
    backends.run(OPERATION, empty, weight.requires_grad_(), **EPS).sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0, 12) and weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("view", ["beside the gates", "transposed", "columns"])
def test_views(view: str) -> None:
    """Queries of [B, T, H, 2, K] are evenly spaced rows, those of transposed tokens are not, and columns not contiguous."""
    wide = draw(2, 3, 5, 2, 8)
    x = part(view)(wide)
    weight = draw(x.shape[-1], seed=1)
    expected = backends.run(OPERATION, x.contiguous(), weight, **EPS)
    with backends.ran() as ran:
        assert torch.equal(backends.run(OPERATION, x, weight, **EPS), expected)
    assert ran.counts == {(OPERATION, "triton"): 1}
    ours, theirs = (
        gradients(lambda x, w, cut=cut: backends.run(OPERATION, cut(x), w, **EPS), wide, weight)
        for cut in (part(view), copied(view))
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def part(view: str):
    return {
        "beside the gates": lambda x: x[:, :, :, 0], "transposed": lambda x: x[:, :, :, 1].transpose(1, 2),
        "columns": lambda x: x[..., 0, ::2],
    }[view]  # fmt: skip


def copied(view: str):
    return lambda x: part(view)(x).contiguous()


def test_one_operation_under_torch_compile() -> None:
    args = draw(7, 24), draw(24, seed=2)

    def call(*args: torch.Tensor) -> torch.Tensor:
        return backends.run(OPERATION, *args, **EPS)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), call(*args))
    assert all(torch.equal(a, b) for a, b in zip(gradients(call, *args), gradients(compiled, *args), strict=True))
    torch.library.opcheck(
        torch.ops.qwen35moe_kernels.rms_norm.default, (args[0].requires_grad_(), args[1], 1e-6),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


def test_unsupported_names_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = draw(2, 8), draw(8)
    assert refusal(OPERATION, "triton", x, weight, **EPS) is None
    assert refusal(OPERATION, "triton", x.double(), weight, **EPS).startswith("x is float64, not one of")
    long = draw(1, 16385)
    assert refusal(OPERATION, "triton", long, long[0], **EPS) == "x has rows of 16385, one program holds 16384"
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        assert refusal(OPERATION, "triton", x, weight, **EPS) == "x is on cpu, not on CUDA"
