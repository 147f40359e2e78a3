"""Default dtype, default device, deterministic mode and inference mode change no result of an operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe import backends
from qwen35moe.backends.cases import CASES
from qwen35moe.config import Config
from qwen35moe.ops import sampling
from qwen35moe.ops.attention_map import attention_map, state_map
from qwen35moe.ops.balancing import LoadBalance, load_balancing_loss, router_z_loss, sequence_numbers
from qwen35moe.ops.losses import shift_labels
from qwen35moe.ops.mrope import rotary_tables
from qwen35moe.ops.rope import inverse_frequencies
from qwen35moe.ops.vision_grid import coordinates, frame_bounds, interpolated, rotation
from tests.support.peer import generator


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(not before[0])
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


STATES: dict[str, Callable[[], Any]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),  # a tensor without a device cannot be used
    "deterministic": deterministic,
    "inference": torch.inference_mode,
}


def calls_of_operations(dtype: torch.dtype) -> Iterator[Callable[[], list[Tensor | None]]]:
    """Every implementation on the first case and on the last (packed documents), with gradients where it has them."""
    for operation in backends.OPERATIONS:
        cases = list(CASES[operation](dtype, "cpu", generator(0)))
        for args, kwargs in (cases[0], cases[-1]):
            for entry in backends.implementations(operation):
                long = operation == "gated_delta_rule" and args[0].shape[1] > 64 and entry.name in ("recurrent", "chunked")
                if entry.builtin and not entry.missing and not long:
                    yield lambda entry=entry, args=args, kwargs=kwargs: call(entry, args, kwargs)


def call(entry: Any, args: tuple, kwargs: dict) -> list[Tensor | None]:
    grad = entry.differentiable and not torch.is_inference_mode_enabled()
    values = [x.detach().clone() if isinstance(x, Tensor) else x for x in (*args, *kwargs.values())]
    floats = [x for x in values if isinstance(x, Tensor) and x.is_floating_point()]
    for x in floats if grad else ():
        x.requires_grad_()
    args, kwargs = tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))
    with torch.set_grad_enabled(grad):
        if entry.refusal(args, kwargs):
            return []
        result = entry.fn(*args, **kwargs)
    outputs = list(result) if isinstance(result, tuple) else [result]
    roots = [x for x in outputs if x.requires_grad]
    gradients = torch.autograd.grad(roots, floats, [torch.ones_like(x) for x in roots], allow_unused=True) if roots else ()
    return [*outputs, *gradients]


def other_calls() -> Iterator[Callable[[], list[Tensor]]]:
    """The functions beside the operations."""
    cpu = torch.device("cpu")
    logits, mask = torch.randn(2, 6, 5, generator=generator(0)), torch.tensor([1, 1, 0, 1, 0, 1])
    indices, table = logits.topk(2).indices, torch.randn(16, 6, generator=generator(1)).bfloat16()
    bounds, labels = torch.tensor([0, 2, 5]), torch.tensor([[3, 1, 4, 1, 5]])
    query, gate = torch.randn(1, 5, 2, 4, generator=generator(2)), torch.rand(1, 5, 4, generator=generator(3))
    rope, positions = Config.preset("35b-a3b").text_config.rope, torch.arange(5).expand(3, 1, 5)
    uniform = torch.tensor([0.2, 0.3], dtype=torch.float64)

    def balance() -> list[Tensor]:
        state = LoadBalance(5)
        state.count(indices, mask)
        return [state.share(logits, mask), state.value()]

    yield balance
    yield lambda: [load_balancing_loss(logits, indices, mask=mask), router_z_loss(logits, mask=mask)]
    yield lambda: [sequence_numbers((2, 3)), sequence_numbers((1, 5), bounds), shift_labels(labels, bounds)]
    yield lambda: [frame_bounds([(1, 4, 6)]), *rotation(coordinates([(1, 4, 6)], 2, cpu), 8, torch.float32)]
    yield lambda: [interpolated(table, [(1, 4, 6)], 2)]
    yield lambda: [attention_map(query, query, decay=-gate, beta=gate, cu_seqlens=bounds)]
    yield lambda: [state_map(query, decay=-gate, beta=gate)]
    yield lambda: list(rotary_tables(positions, inverse_frequencies(rope, 8, 4096)[0], [2, 1, 1], 1.0, torch.float32))
    yield lambda: [sampling.seen_tokens(labels, 9), sampling.sample(table[:2].float(), uniform), *sampling.shortlist(table, 2)]
    yield lambda: [sampling.top_p(table, 0.5), sampling.min_p(table, 0.5), sampling.top_k(table, 2)]
    yield lambda: [sampling.repetition_penalty(table, table > 0, 1.2), sampling.presence_penalty(table, table > 0, 0.5)]


@pytest.fixture(scope="module")
def functions() -> list[tuple[Callable[[], Any], list[Any]]]:
    """(function, its result)."""
    return [(function, function()) for function in (*calls_of_operations(torch.bfloat16), *other_calls())]


@pytest.mark.parametrize("state", STATES)
def test_no_bit_depends_on_it(state: str, functions: list[tuple[Callable[[], Any], list[Any]]]) -> None:
    for function, expected in functions:
        with STATES[state]():
            actual = function()
        for a, b in zip(actual, expected, strict=state != "inference"):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b)
