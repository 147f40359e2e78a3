"""The kernels on a GPU, at the sizes of Qwen3.5-35B-A3B, forward and backward against the definitions in float64.

`python -m pytest -m gpu tests` runs them. The small cases of the other files also run compiled on a GPU.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from qwen35moe import backends
from tests.support.kernel_checks import DTYPES, assert_close, draw, integers
from tests.triton.test_step import arguments

pytestmark = pytest.mark.gpu
C, W, G, H, K = 8192, 4, 16, 32, 128
# A GPU rounds to nearest: relative to the largest value, an error of at most 2^-8 in bfloat16.
ROUNDED = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def check(operation: str, args: tuple, options: dict[str, Any], dtype: torch.dtype, *, differentiable: bool = True) -> None:
    backward = 4 * ROUNDED[dtype] if differentiable else None
    assert_close(operation, "triton", args, options, dtype, forward=2 * ROUNDED[dtype], backward=backward)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 64, 1025])
def test_convolution_from_a_state(tokens: int, dtype: torch.dtype) -> None:
    args = draw(3, tokens, C, dtype=dtype), draw(C, W, seed=1, dtype=dtype)
    check("short_convolution", args, {"state": draw(3, C, W - 1, seed=2, dtype=dtype)}, dtype)


def test_convolution_of_padded_rows_and_packed_documents() -> None:
    args = draw(4, 700, C, dtype=torch.bfloat16), draw(C, W, seed=1, dtype=torch.bfloat16)
    check("short_convolution", args, {"lengths": integers(700, 1, 333, 2)}, torch.bfloat16)
    bounds = integers(0, 1, 4, 68, 1000, 2800)
    options = {"cu_seqlens": bounds, "state": draw(5, C, W - 1, seed=2, dtype=torch.bfloat16)}
    check("short_convolution", (args[0].view(1, 2800, C), args[1]), options, torch.bfloat16)


def test_convolution_beyond_2_to_the_31_elements() -> None:
    """The last tokens of a row, whose offsets do not fit into 32 bits, equal these tokens alone."""
    tokens = (1 << 31) // C + 100
    x, weight = torch.empty(1, tokens, C, dtype=torch.bfloat16, device="cuda"), draw(C, W, dtype=torch.bfloat16)
    x[:, -200:] = draw(1, 200, C, seed=1, dtype=torch.bfloat16)
    x[:, :-200] = 0
    with backends.use(short_convolution="triton"):
        y, after = backends.run("short_convolution", x, weight)
        alone, last = backends.run("short_convolution", x[:, -200:], weight)
    assert torch.equal(y[:, -200:], alone) and torch.equal(after, last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_norm(dtype: torch.dtype) -> None:
    shape = (2, 1025, H, K)
    args = draw(*shape, dtype=dtype), draw(*shape, seed=1, dtype=dtype), 1 + 0.2 * draw(K, seed=2)
    check("gated_rms_norm", args, {"eps": 1e-6}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 1025, 2048), (1, 2048), (2, 65, 16, 256)], ids=str)
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check("rms_norm", (draw(*shape, dtype=dtype), 0.2 * draw(shape[-1], seed=2)), {"eps": 1e-6}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 1025])
def test_rotary(tokens: int, dtype: torch.dtype) -> None:
    """Heads of 256, of which 64 entries are rotated. The backward is the kernel with the negative angle."""
    angle = 3 * draw(2, tokens, 32, seed=2)
    args = draw(2, tokens, 16, 256, dtype=dtype), draw(2, tokens, 2, 256, seed=1, dtype=dtype), angle.cos(), angle.sin()
    leaves = [x.requires_grad_() for x in args[:2]]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    with backends.use(rotary="triton"):
        ours = backends.run("rotary", *args)
    theirs = backends.cases("rotary")[0](*exact, *(x.double() for x in args[2:]))
    pairs = (ours, leaves), (theirs, exact)
    gradients = [torch.autograd.grad(sum(x.double().square().sum() for x in out), of) for out, of in pairs]
    for a, b in (*zip(ours, theirs, strict=True), *zip(*gradients, strict=True)):
        assert (a - b).abs().max() <= 4 * ROUNDED[dtype] * b.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 1025])
def test_fused_operations(tokens: int, dtype: torch.dtype) -> None:
    """Products of 2048 numbers are sums of as many rounded inputs, so that the bound is relative to the largest."""
    D, F, angle = 2048, 512, 3 * draw(1, tokens, 32, seed=2)
    rows = [draw(tokens, D, seed=seed, dtype=dtype) for seed in range(4)]
    weights = [D**-0.5 * draw(size, D, seed=9 + size, dtype=dtype) for size in (8192, 4096, 32, 32)]
    heads = draw(1, tokens, 16, 2, 256, dtype=dtype)[..., 0, :], draw(1, tokens, 2, 256, seed=1, dtype=dtype)
    norms = 0.2 * draw(256, seed=3), 0.2 * draw(256, seed=4)
    for name, args, options in (
        ("add_rms_norm", (*rows[:2], 0.2 * draw(D)), {"eps": 1e-6}),
        ("projections", (rows[0], *weights), {}), ("projections", (rows[0], *weights[1:]), {}),
        ("swiglu", (rows[0], weights[0][:F], weights[1][:F]), {}),
        ("add_shared_expert", (*rows, weights[2][:1]), {}),
        ("sigmoid_gate", (draw(1, tokens, 16, 256, seed=5, dtype=dtype), heads[0]), {}),
        ("norm_rotary", (*heads, angle.cos(), angle.sin(), *norms), {"eps": 1e-6}),
    ):  # fmt: skip
        check(name, args, options, dtype, differentiable=False)


def test_the_sum_before_the_norm_has_the_bits_of_an_addition() -> None:
    residual, change = (draw(3, 2048, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    with backends.use(add_rms_norm="triton"):
        total, normed = backends.run("add_rms_norm", residual, change, 0.2 * draw(2048), eps=1e-6)
    with backends.use(rms_norm="triton"):
        assert torch.equal(normed, backends.run("rms_norm", total, 0.2 * draw(2048), eps=1e-6))
    assert torch.equal(total, residual + change)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 1025])
def test_router(tokens: int, dtype: torch.dtype) -> None:
    hidden, weight = draw(tokens, 2048, dtype=dtype), 0.02 * draw(256, 2048, seed=1, dtype=dtype)
    with backends.use(router="triton"):
        logits, weights, indices = backends.run("router", hidden, weight, top_k=8)
    expected = logits.float().softmax(-1).topk(8).values
    expected = expected / expected.sum(-1, keepdim=True)
    assert (weights - expected).abs().max() <= 2 * ROUNDED[dtype] and (logits.gather(1, indices).diff(dim=1) <= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gates", ["ordinary", "transformers", "hard"])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_one_token(batch: int, gates: str, dtype: torch.dtype) -> None:
    args, options = arguments(batch, G, H, K, K, W, dtype, gates)
    check("delta_net_step", args, options, dtype, differentiable=False)


def test_auto_takes_the_kernels() -> None:
    args, options = arguments(2, G, H, K, K, W, torch.bfloat16)
    with torch.no_grad(), backends.ran() as ran:
        backends.run("delta_net_step", *args, **options)
        backends.run("gated_rms_norm", draw(3, K), draw(3, K), draw(K), eps=1e-6)
        backends.run("rms_norm", draw(3, K), draw(K), eps=1e-6)
        backends.run("router", draw(3, K), draw(C, K), top_k=8)
        backends.run("rotary", draw(1, 3, 2, K), draw(1, 3, 1, K), draw(1, 3, 32), draw(1, 3, 32))
    names = ("delta_net_step", "gated_rms_norm", "rms_norm", "router", "rotary")
    assert ran.counts == {(name, "triton"): 1 for name in names}


@pytest.mark.parametrize("package", ["causal_conv1d", "flash_attn"])
def test_packages_against_the_definitions(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    report = backends.verify(package, dtypes=(torch.bfloat16, torch.float16))
    assert report.ok, str(report)
