"""The Triton router: shapes, dtypes, ties, values that are no numbers, gradients; one operation when compiled."""

from __future__ import annotations

import pytest
import torch

from qwen35moe import backends
from qwen35moe.ops import router
from tests.support.kernel_checks import DEVICE, DTYPES, draw, refusal

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    from qwen35moe_kernels import router as launches

    monkeypatch.setattr(launches, "_ELEMENTS", 64)
    with backends.use(router="triton"):
        yield


def definition(hidden: torch.Tensor, weight: torch.Tensor, top_k: int) -> tuple[torch.Tensor, ...]:
    return router.definition(hidden, weight, top_k=top_k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 8, 16, 4), (7, 12, 5, 2), (37, 6, 21, 8), (3, 10, 6, 6), (5, 9, 4, 1)], ids=str)
def test_every_shape_and_dtype(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    N, D, E, top_k = sizes
    hidden, weight = draw(N, D, dtype=dtype), draw(E, D, seed=1, dtype=dtype)
    ours, theirs = backends.run("router", hidden, weight, top_k=top_k), definition(hidden, weight, top_k)
    assert torch.equal(ours[0], theirs[0]) and ours[1].dtype == dtype and ours[2].dtype == torch.int64
    assert (ours[1] - theirs[1]).abs().max() <= (2e-6 if dtype == torch.float32 else 2**-7)
    chosen = ours[0].gather(1, ours[2]), ours[0].gather(1, theirs[2])  # equal logits may be taken in another order
    assert torch.equal(*chosen) and all(len(set(row)) == top_k for row in ours[2].tolist())


def test_ties_take_the_first_experts() -> None:
    hidden, weight = torch.ones(3, 4, device=DEVICE), torch.ones(9, 4, device=DEVICE)
    _, weights, indices = backends.run("router", hidden, weight, top_k=3)
    assert indices.tolist() == [[0, 1, 2]] * 3 and torch.allclose(weights, torch.full_like(weights, 1 / 3))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_values_that_are_no_numbers_give_nan_weights_and_valid_indices() -> None:
    hidden, weight = draw(5, 4), draw(9, 4, seed=1)
    hidden[1, 2], hidden[3, 0] = float("nan"), float("inf")
    _, weights, indices = backends.run("router", hidden, weight, top_k=3)
    expected = definition(hidden, weight, 3)[1]
    assert weights[[1, 3]].isnan().all() and expected[[1, 3]].isnan().all()
    assert torch.allclose(weights[[0, 2, 4]], expected[[0, 2, 4]], atol=1e-6)
    assert all(0 <= i < 9 for i in indices.flatten().tolist()) and all(len(set(row)) == 3 for row in indices.tolist())


def test_widely_spread_logits() -> None:
    """An expert whose probability is zero in float32 may still be chosen, once, with weight zero."""
    hidden, weight = torch.eye(1, 2, device=DEVICE), torch.zeros(5, 2, device=DEVICE)
    weight[:, 0] = torch.tensor([0.0, 300.0, -200.0, 299.0, -300.0])
    _, weights, indices = backends.run("router", hidden, weight, top_k=4)
    assert indices[0, :2].tolist() == [1, 3] and len(set(indices[0].tolist())) == 4
    assert torch.allclose(weights, definition(hidden, weight, 4)[1])


@pytest.mark.parametrize("top_k", [1, 3])
def test_gradients(top_k: int) -> None:
    hidden, weight = draw(7, 12), draw(9, 12, seed=1)
    factor = [draw(7, n, seed=3 + n) for n in (9, top_k)]
    results = []
    for run, dtype in ((None, torch.float32), (definition, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        logits, weights, _ = backends.run("router", *leaves, top_k=top_k) if run is None else run(*leaves, top_k)
        loss = (logits * factor[0].to(dtype)).sum() + (weights * factor[1].to(dtype)).sum()
        results.append(torch.autograd.grad(loss, leaves))
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).abs().max() <= 4e-6 * exact.abs().max()


def test_one_operation_under_torch_compile() -> None:
    hidden, weight = draw(7, 12), draw(9, 12, seed=1)

    def call(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return backends.run("router", hidden, weight, top_k=3)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(hidden, weight), call(hidden, weight), strict=True))
    torch.library.opcheck(
        torch.ops.qwen35moe_kernels.router.default, (draw(7, 9).requires_grad_(), 3),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


def test_unsupported_names_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = draw(7, 12), draw(41, 12)
    assert refusal("router", "triton", hidden, weight, top_k=3) is None
    assert refusal("router", "triton", hidden, weight, top_k=33) == "33 experts per token, the limit is 32"
    assert refusal("router", "triton", hidden, weight.double(), top_k=3).startswith("weight is float64, not one of")
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        assert refusal("router", "triton", hidden, weight, top_k=3) == "hidden is on cpu, not on CUDA"
