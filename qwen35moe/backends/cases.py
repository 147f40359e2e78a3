"""The arguments on which the implementations of each operation are judged. Sizes are pairwise different.

A generator of cases takes (dtype, device, generator) and yields (args, kwargs): tensors in `dtype` on `device`, drawn from the
CPU generator. Router cases avoid ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from .operation import find_operation

Cases: TypeAlias = "Iterator[tuple[tuple, dict]]"
IGNORE = -100  # the label of a position without a loss


def rms_norm_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    for shape in ((2, 5, 24), (1, 1, 7), (3, 130)):
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
        weight = 0.3 * torch.randn(shape[-1], generator=generator, dtype=torch.float64).to(device, dtype)
        yield (x, weight), {"eps": 1e-6}


def gated_rms_norm_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    for (x, weight), options in rms_norm_cases(dtype, device, generator):
        gate = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(device, dtype)
        yield (x, gate, 1 + weight), options


def rotary_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    for batch, tokens, heads, groups, width, pairs in ((2, 5, 6, 3, 16, 4), (1, 3, 2, 1, 12, 6), (2, 70, 2, 1, 12, 5)):
        query = torch.randn(batch, tokens, heads, width, generator=generator, dtype=torch.float64)
        key = torch.randn(batch, tokens, groups, width, generator=generator, dtype=torch.float64)
        angle = 6.3 * torch.rand(batch, tokens, pairs, generator=generator, dtype=torch.float64)
        table = torch.promote_types(torch.float32, dtype)
        yield (
            query.to(device, dtype), key.to(device, dtype), angle.cos().to(device, table), angle.sin().to(device, table)
        ), {}


def attention_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    sizes = [(2, 7, 7, 6, 3, 16, 0), (2, 3, 9, 4, 2, 8, 6), (3, 1, 12, 4, 1, 24, 11), (1, 10, 10, 2, 2, 8, 0)]
    for number, (batch, tokens, positions, heads, groups, width, start) in enumerate(sizes):
        shapes = ((tokens, heads), (positions, groups), (positions, groups))
        tensors = [torch.randn(batch, *s, width, generator=generator, dtype=torch.float64) for s in shapes]
        bounds = torch.tensor([0, 1, 4, 10], device=device) if number == 3 else None
        ragged = torch.tensor([start, start - 2], device=device) if number == 1 else start
        options = {"scale": width**-0.5, "starts": ragged, "cu_seqlens": bounds}
        yield tuple(x.to(device, dtype) for x in tensors), options


def vision_attention_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    for bounds in ([0, 4, 5, 13], [0, 3, 3, 8, 13], [0, 13]):
        tensors = [torch.randn(13, 3, 8, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(3)]
        yield tuple(tensors), {"cu_seqlens": torch.tensor(bounds, device=device), "scale": 0.3}


def gelu_linear_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    for rows, width, inner, approximate in ((7, 12, 5, "tanh"), (1, 33, 40, "none"), (65, 8, 3, "tanh")):
        shapes = (rows, width), (inner, width), (inner,)
        tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]
        yield tuple(tensors), {"approximate": approximate}


def short_convolution_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    for batch, tokens, channels, taps in ((2, 7, 12, 4), (3, 1, 5, 2), (1, 65, 10, 4)):
        x = torch.randn(batch, tokens, channels, generator=generator, dtype=torch.float64).to(device, dtype)
        weight = torch.randn(channels, taps, generator=generator, dtype=torch.float64).to(device, dtype)
        state = torch.randn(batch, channels, taps - 1, generator=generator, dtype=torch.float64).to(device, dtype)
        yield (x, weight), {}
        yield (x, weight), {"state": state}
        if batch == 1:
            bounds = torch.tensor([0, 1, 3, 40, tokens], device=device)
            yield (x, weight), {"cu_seqlens": bounds, "state": state.expand(4, -1, -1).contiguous()}


def gated_delta_rule_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    sizes = [(2, 1, 1, 1, 8, 12), (1, 65, 2, 6, 16, 24), (2, 129, 1, 2, 12, 8), (1, 130, 2, 4, 8, 16)]
    for number, (batch, tokens, groups, heads, width, out) in enumerate(sizes):

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        qk = [random(batch, tokens, groups, width).to(device, dtype) for _ in range(2)]
        value = random(batch, tokens, heads, out).to(device, dtype)
        wide = torch.promote_types(torch.float32, dtype)
        decay = -torch.exp(random(batch, tokens, heads) * 2 - 3).to(device, wide)
        options = {"decay": decay, "beta": random(batch, tokens, heads).sigmoid().to(device, wide)}
        if number == 3:
            options["cu_seqlens"] = torch.tensor([0, 1, 64, 67, 130], device=device)
        rows = 4 if number == 3 else batch
        if number != 1:
            options["state"] = random(rows, heads, width, out).to(device, wide)
        yield (*qk, value), options


def delta_net_step_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    for batch, groups, heads, width, out, taps in ((3, 2, 4, 8, 12, 4), (1, 1, 3, 16, 8, 2)):
        channels = 2 * groups * width + heads * out
        wide = torch.promote_types(torch.float32, dtype)

        def random(*shape: int, to: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, to)

        args = random(batch, channels), random(batch, heads, out), random(batch, heads), random(batch, heads)
        yield args, {
            "conv_state": random(batch, channels, taps - 1), "recurrent_state": random(batch, heads, width, out, to=wide),
            "conv_weight": random(channels, taps), "A_log": random(heads, to=wide), "dt_bias": random(heads, to=wide),
            "norm_weight": random(out, to=wide), "groups": groups, "eps": 1e-6,
        }


def router_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    for tokens, width, experts, top_k in ((7, 12, 5, 2), (1, 8, 16, 4)):
        hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(device, dtype)
        weight = torch.randn(experts, width, generator=generator, dtype=torch.float64).to(device, dtype)
        yield (hidden, weight), {"top_k": top_k}


def experts_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    for tokens, width, inner, experts, top_k in ((7, 12, 5, 6, 2), (1, 8, 3, 4, 4), (70, 16, 8, 3, 1), (9, 24, 16, 5, 2)):

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

        scores = torch.rand(tokens, experts, generator=generator)
        indices = scores.topk(top_k, dim=-1).indices.to(device)
        weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64).to(device, dtype)
        tensors = random(tokens, width), random(experts, 2 * inner, width), random(experts, width, inner)
        yield (*tensors, indices, weights), {}


def linear_cross_entropy_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    for tokens, width, words in ((7, 12, 31), (600, 5, 17)):
        hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(device, dtype)
        weight = torch.randn(words, width, generator=generator, dtype=torch.float64).to(device, dtype)
        labels = torch.randint(0, words, (tokens,), generator=generator).to(device)
        labels[1] = IGNORE
        yield (hidden, weight, labels), {}
        yield (hidden, weight, labels), {"num_items": 5}

CASES: dict[str, Callable[..., Cases]] = {
    "rms_norm": rms_norm_cases,
    "gated_rms_norm": gated_rms_norm_cases,
    "rotary": rotary_cases,
    "attention": attention_cases,
    "vision_attention": vision_attention_cases,
    "gelu_linear": gelu_linear_cases,
    "short_convolution": short_convolution_cases,
    "gated_delta_rule": gated_delta_rule_cases,
    "delta_net_step": delta_net_step_cases,
    "router": router_cases,
    "experts": experts_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
}
_added: dict[str, tuple[Callable[..., object], Callable[..., Cases]]] = {}  # by `add_cases`


def add_cases(operation: str, definition: Callable[..., object], cases: Callable[..., Cases]) -> None:
    """Judge an operation's implementations by another definition, on other cases."""
    _added[find_operation(operation).name] = definition, cases


def cases(operation: str) -> tuple[Callable[..., object], Callable[..., Cases]]:
    """(definition, cases) of an operation."""
    op = find_operation(operation)
    return _added.get(op.name) or (op.definition, CASES[op.name])
