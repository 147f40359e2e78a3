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
    assert ran.counts == {("delta_net_step", "triton"): 1, ("gated_rms_norm", "triton"): 1}


@pytest.mark.parametrize("package", ["causal_conv1d", "flash_attn"])
def test_packages_against_the_definitions(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    report = backends.verify(package, dtypes=(torch.bfloat16, torch.float16))
    assert report.ok, str(report)
