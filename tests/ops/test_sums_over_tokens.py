"""Gradients in bfloat16 at 6,000 tokens, of every form, against float64: sums over tokens are float32.

Inputs and gradients have a mean, so that sums grow with the number of tokens: a running sum in bfloat16 stops growing at 256
times its terms, and is off by 0.2 to 0.9. A result that is rounded once is off by 2^-9 of each entry, the norm by less.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35moe import backends
from qwen35moe.backends.operation import TABLE
from qwen35moe.modules.embedding import Embedding
from qwen35moe.ops.embedding import embedding
from tests.support.peer import generator

TOKENS = 6000
ROUNDED = 2.0**-8  # of the norm: one rounding of the result, and some of the values in between


def draw(*shape: int, mean: float = 0.0, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=generator(seed), dtype=torch.float64) + mean).bfloat16()


def cases() -> Iterator[tuple[str, str, tuple, dict, tuple[int, ...]]]:
    """(id, operation, arguments, options, numbers of the arguments whose gradients are sums over tokens)."""
    N = TOKENS
    x, labels = draw(N, 24, mean=0.5), torch.randint(0, 37, (N,), generator=generator(1))
    indices = torch.rand(N, 4, generator=generator(2)).topk(2).indices
    weights = torch.rand(N, 2, generator=generator(3)).bfloat16()
    grouped = draw(4, 10, 8, seed=1), draw(4, 8, 5, seed=2)
    yield "experts", "experts", (x[:, :8].contiguous(), *grouped, indices, weights), {}, (1, 2)
    yield "loss", "linear_cross_entropy", (x, draw(37, 24), labels), {}, (1,)
    yield "convolution", "short_convolution", (draw(1, N, 12, mean=0.5), draw(12, 4)), {}, (1,)
    documents = torch.arange(0, N + 1, 40)
    yield "documents", "short_convolution", (draw(1, N, 12, mean=0.5), draw(12, 4)), {"cu_seqlens": documents}, (1,)
    yield "norm", "rms_norm", (x, draw(24)), {"eps": 1e-6}, (1,)
    yield "gated norm", "gated_rms_norm", (x, draw(N, 24), draw(24)), {"eps": 1e-6}, (2,)
    yield "router", "router", (x, draw(8, 24)), {"top_k": 2}, (1,)
    yield "gelu", "gelu_linear", (x, draw(20, 24), draw(20)), {"approximate": "tanh"}, (1, 2)
    qkv = draw(1, 3000, 1, 8), draw(1, 3000, 1, 8, seed=1), draw(1, 3000, 1, 8, mean=0.5)  # times 3000 keys
    yield "attention", "attention", qkv, {"scale": 0.3}, (1, 2)
    frames = tuple(x[0, :1700] for x in qkv)
    yield "vision", "vision_attention", frames, {"scale": 0.3, "cu_seqlens": torch.tensor([0, 1700])}, (0, 1, 2)


CASES = {name: case for name, *case in cases()}
FORMS = [
    (name, entry.name) for name, (operation, args, options, _) in CASES.items()
    for entry in backends.implementations(operation)
    if entry.builtin and entry.name != "eager" and entry.differentiable
    and not entry.missing and not entry.refusal(args, options)
]  # fmt: skip
EXPECTED: dict[str, list[Tensor]] = {}  # the same for all forms of a case


def gradients(fn: Any, args: tuple, options: dict, wanted: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    values = [x.to(dtype).requires_grad_() if x.is_floating_point() else x for x in args]
    result = fn(*values, **options)
    output = result[0] if isinstance(result, tuple) else result
    upstream = (0.1 * torch.randn(output.shape, generator=generator(5), dtype=torch.float64) + 1).bfloat16()
    return list(torch.autograd.grad(output, [values[i] for i in wanted], upstream.to(output.dtype)))


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_gradient_summed_over_tokens_is_rounded_once(name: str, form: str) -> None:
    operation, args, options, wanted = CASES[name]
    if name not in EXPECTED:
        EXPECTED[name] = gradients(TABLE[operation].definition, args, options, wanted, torch.float64)
    fn = TABLE[operation].find(form).fn
    for actual, expected in zip(gradients(fn, args, options, wanted, torch.bfloat16), EXPECTED[name], strict=True):
        assert actual.dtype == torch.bfloat16
        assert (actual.double() - expected).norm() <= ROUNDED * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", [None, 3])
def test_the_embedding_of_a_frequent_token(dtype: torch.dtype, padding: int | None) -> None:
    ids = torch.randint(0, 11, (3, 2000), generator=generator(0))
    ids[:, :1500] = 7
    weight = draw(11, 13).to(dtype)
    upstream = (0.1 * torch.randn(3, 2000, 13, generator=generator(1)) + 1).to(dtype)
    table, exact = weight.clone().requires_grad_(), weight.double().requires_grad_()
    out = embedding(ids, table, padding)
    assert torch.equal(out, F.embedding(ids, weight))
    (gradient,) = torch.autograd.grad(out, table, upstream)
    (expected,) = torch.autograd.grad(F.embedding(ids, exact, padding), exact, upstream.double())
    assert gradient.dtype == dtype and (gradient.double() - expected).norm() <= ROUNDED * expected.norm()
    assert padding is None or gradient[padding].abs().max() == 0


def test_the_embedding_in_float32_keeps_torchs_bits_and_the_module_its_type() -> None:
    ids = torch.randint(0, 11, (3, 50), generator=generator(0))
    module = Embedding(11, 13, padding_idx=2)
    upstream = torch.randn(3, 50, 13, generator=generator(1))
    (ours,) = torch.autograd.grad(module(ids), module.weight, upstream)
    (theirs,) = torch.autograd.grad(F.embedding(ids, module.weight, 2), module.weight, upstream)
    assert torch.equal(ours, theirs) and isinstance(module, torch.nn.Embedding)


def test_derivatives_and_batches_of_the_embedding() -> None:
    ids = torch.tensor([[1, 4, 4], [0, 2, 4]])
    weight = draw(5, 3).requires_grad_()
    gradient = torch.func.grad(lambda w: embedding(ids, w).float().square().sum())(weight)
    counts = torch.tensor([1, 1, 1, 0, 3])[:, None]
    assert torch.equal(gradient, (2 * weight * counts).detach())
    tables = torch.stack([weight.detach(), 2 * weight.detach()])
    assert torch.equal(torch.vmap(lambda w: embedding(ids, w, 4))(tables), torch.stack([F.embedding(ids, w) for w in tables]))
    per_table = torch.vmap(torch.func.grad(lambda w: embedding(ids, w, 4).float().square().sum()))(tables)
    counts[4] = 0
    assert torch.equal(per_table, 2 * tables * counts)
    out = embedding(ids, weight)
    (first,) = torch.autograd.grad(out.float().square().sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.float().sum(), weight)
    assert torch.equal(second, (2 * torch.tensor([1, 1, 1, 0, 3])[:, None]).expand(5, 3).bfloat16())
    tangent = torch.func.jvp(lambda w: embedding(ids, w), (weight.detach(),), (torch.ones(5, 3).bfloat16(),))[1]
    assert torch.equal(tangent, torch.ones(2, 3, 3).bfloat16())
