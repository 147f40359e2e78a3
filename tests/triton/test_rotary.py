"""The Triton rotary embedding: shapes, dtypes, gradients, views; one operation when compiled."""

from __future__ import annotations

import pytest
import torch

from qwen35moe import backends
from tests.support.kernel_checks import DEVICE, DTYPES, ROUNDED, draw, gradients, refusal

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def chosen():
    with backends.use(rotary="triton"):
        yield


def inputs(B: int, T: int, H: int, G: int, K: int, half: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    angle = 3 * draw(B, T, half, seed=2)
    return draw(B, T, H, K, dtype=dtype), draw(B, T, G, K, seed=1, dtype=dtype), angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(2, 5, 6, 3, 16, 4), (1, 3, 2, 1, 12, 6), (3, 1, 4, 2, 10, 3)], ids=str)
def test_every_shape_and_dtype(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    query, key, cos, sin = inputs(*sizes, dtype=dtype)  # type: ignore[arg-type]
    expected = backends.cases("rotary")[0](query.double(), key.double(), cos.double(), sin.double())
    for ours, exact in zip(backends.run("rotary", query, key, cos, sin), expected, strict=True):
        assert ours.dtype == dtype and (ours - exact).abs().max() <= ROUNDED[dtype] * exact.abs().max()


def test_the_entries_behind_the_rotated_ones_are_unchanged() -> None:
    query, key, cos, sin = inputs(2, 5, 6, 3, 16, 4)
    after, key_after = backends.run("rotary", query, key, cos, sin)
    assert torch.equal(after[..., 8:], query[..., 8:]) and torch.equal(key_after[..., 8:], key[..., 8:])


def test_gradients() -> None:
    query, key, cos, sin = inputs(2, 5, 6, 3, 16, 4)
    with pytest.raises(ValueError, match="cos or sin requires a gradient"):
        backends.run("rotary", query, key, cos.requires_grad_(), sin)
    cos.requires_grad_(False)
    exact = [x.double() for x in (query, key)]
    ours = gradients(lambda q, k: backends.run("rotary", q, k, cos, sin), query, key)
    theirs = gradients(lambda q, k: backends.cases("rotary")[0](q, k, cos.double(), sin.double()), *exact)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 4e-6 * b.abs().max()


def test_views_and_positions_shared_by_the_rows() -> None:
    query, key, cos, sin = inputs(2, 5, 6, 3, 16, 4)
    one = [x[:1].expand(2, -1, -1) for x in (cos, sin)]
    both = [backends.run("rotary", query, key, *(x.contiguous() for x in one))]
    wide = torch.stack([query, query + 1], 3)
    both.append(backends.run("rotary", wide[:, :, :, 0], key.transpose(0, 1).contiguous().transpose(0, 1), *one))
    for a, b in zip(*both, strict=True):
        assert torch.equal(a, b) and b.is_contiguous()


def test_one_operation_under_torch_compile() -> None:
    query, key, cos, sin = inputs(2, 5, 6, 3, 16, 4)

    def call(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return backends.run("rotary", query, key, cos, sin)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(query, key), call(query, key), strict=True))
    for a, b in zip(gradients(call, query, key), gradients(compiled, query, key), strict=True):
        assert torch.equal(a, b)
    torch.library.opcheck(
        torch.ops.qwen35moe_kernels.rotary.default, (query.requires_grad_(), key, cos, sin, False),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


def test_unsupported_names_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, cos, sin = inputs(2, 5, 6, 3, 16, 4)
    assert refusal("rotary", "triton", query, key, cos, sin) is None
    assert refusal("rotary", "triton", query, key.bfloat16(), cos, sin) == "query is torch.float32, key torch.bfloat16"
    assert refusal("rotary", "triton", query, key, cos.double(), sin).startswith("cos is float64, not one of")
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        assert refusal("rotary", "triton", query, key, cos, sin) == "query is on cpu, not on CUDA"
