"""Packed documents without a token, first, last and between others, and calls without a token, in every form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe import backends
from qwen35moe.backends.operation import TABLE
from qwen35moe.ops.losses import linear_cross_entropy, shift_labels
from tests.support.peer import assert_close, generator

T, G, H, K, V, C, W = 37, 2, 4, 6, 5, 7, 4
BOUNDS = {
    "first": [0, 0, 20, 21, 37], "between": [0, 20, 20, 20, 21, 37], "last": [0, 20, 21, 37, 37],
    "all": [0, 0, 20, 20, 21, 37, 37],
}  # fmt: skip
OPERATIONS = ("gated_delta_rule", "short_convolution", "attention", "vision_attention")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def arguments(operation: str, tokens: int, documents: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """The call, with a state for every document."""
    if operation == "gated_delta_rule":
        gates = torch.rand(2, 1, tokens, H, generator=generator(1), dtype=torch.float64)
        args = draw(1, tokens, G, K), draw(1, tokens, G, K, seed=2), draw(1, tokens, H, V, seed=3)
        return args, {"decay": -0.1 * gates[0], "beta": gates[1], "state": draw(documents, H, K, V, seed=4)}
    if operation == "short_convolution":
        return (draw(1, tokens, C), draw(C, W)), {"state": draw(documents, C, W - 1, seed=4)}
    if operation == "attention":
        return (draw(1, tokens, H, K), draw(1, tokens, G, K, seed=1), draw(1, tokens, G, V, seed=2)), {"scale": 0.4}
    return tuple(draw(tokens, G, K, seed=n) for n in range(3)), {"scale": 0.4}


def run(fn: Any, args: tuple[Tensor, ...], options: dict[str, Any], grad: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of every argument and of the state for weights that do not depend on the empty documents."""
    values = [x.clone().requires_grad_(grad) for x in args]
    floats = {name: x for name, x in options.items() if isinstance(x, Tensor) and x.is_floating_point()}
    options = options | {name: x.clone().requires_grad_(grad) for name, x in floats.items()}
    result = fn(*values, **options)
    outputs = list(result) if isinstance(result, tuple) else [result]
    if not grad:
        return outputs, []
    leaves = [*values, *(x for x in options.values() if isinstance(x, Tensor) and x.requires_grad)]
    sums = [(x * draw(*x.shape[1:], seed=9)).sum() for x in outputs if x.requires_grad]
    return outputs, list(torch.autograd.grad(sums, leaves, allow_unused=True, materialize_grads=True))


def forms(operation: str) -> list[Any]:
    half = ("bf16_scores", "bf16_blocks")  # in bfloat16 only
    return [e for e in backends.implementations(operation) if e.builtin and not e.missing and e.name not in half]


@pytest.mark.parametrize("place", BOUNDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_empty_document_changes_nothing_and_keeps_its_state(operation: str, place: str) -> None:
    bounds = torch.tensor(BOUNDS[place])
    full = [i for i, size in enumerate(bounds.diff().tolist()) if size]
    empty = [i for i in range(len(bounds) - 1) if i not in full]
    args, options = arguments(operation, T, len(bounds) - 1)
    kept = {"cu_seqlens": torch.tensor([0, 20, 21, 37])} | {n: x[full] if n == "state" else x for n, x in options.items()}
    expected, expected_gradients = run(TABLE[operation].definition, args, kept, grad=True)
    for entry in forms(operation):
        for dtype in (torch.int32, torch.int64):
            call = options | {"cu_seqlens": bounds.to(dtype)}
            outputs, gradients = run(entry.fn, args, call, entry.differentiable)
            assert_close(outputs[0], expected[0], 1e-12, entry.name)
            if "state" in options:
                assert_close(outputs[1][full], expected[1], 1e-12, entry.name)
                assert torch.equal(outputs[1][empty], options["state"][empty])
            for actual, wanted in zip(gradients, expected_gradients, strict=not gradients == []):
                same = actual.shape == wanted.shape
                assert_close(actual if same else actual[full], wanted, 1e-11, entry.name)
                if not same:  # the state's: that of an empty document is the state after it
                    assert torch.equal(actual[empty], draw(*wanted.shape[1:], seed=9).expand(len(empty), *wanted.shape[1:]))


@pytest.mark.parametrize("bounds", [None, [0, 0], [0, 0, 0], [0]])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_token_at_all(operation: str, bounds: list[int] | None) -> None:
    documents = 1 if bounds is None else len(bounds) - 1
    args, options = arguments(operation, 0, documents)
    options |= {} if bounds is None else {"cu_seqlens": torch.tensor(bounds)}
    if operation == "vision_attention" and bounds is None:
        return  # it always has bounds
    for entry in forms(operation):
        outputs, gradients = run(entry.fn, args, options, entry.differentiable)
        like = args[0] if operation == "short_convolution" else args[2]
        heads = args[0].shape[2] if operation == "attention" else like.shape[-2]
        assert outputs[0].shape == (like.shape if operation != "attention" else (1, 0, heads, V)), entry.name
        if "state" in options:
            assert torch.equal(outputs[1], options["state"])
        assert all(gradient.shape == x.shape for gradient, x in zip(gradients, args, strict=False))


def test_labels_and_loss() -> None:
    labels = torch.tensor([[3, 1, 4, 1, 5]])
    expected = torch.tensor([[1, -100, 1, 5, -100]])
    for bounds in ([0, 2, 5], [0, 0, 2, 2, 5, 5]):
        assert torch.equal(shift_labels(labels, torch.tensor(bounds, dtype=torch.int32)), expected)
    assert shift_labels(labels[:, :0], torch.tensor([0, 0])).shape == (1, 0)
    hidden, weight = draw(0, 6).requires_grad_(), draw(9, 6).requires_grad_()
    for entry in forms("linear_cross_entropy"):
        loss = entry.fn(hidden, weight, torch.zeros(0, dtype=torch.long), num_items=3)
        gradients = torch.autograd.grad(loss, (hidden, weight))
        assert loss.item() == 0 and gradients[0].shape == (0, 6)
        assert torch.equal(gradients[1], torch.zeros(9, 6, dtype=torch.float64))
    assert linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.long)).isnan()  # the mean over nothing, as in torch
