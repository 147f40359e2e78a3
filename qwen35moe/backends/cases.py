"""The arguments on which `verify` runs the implementations of each operation. Sizes are pairwise different.

A generator of cases takes (dtype, device, generator) and yields (args, kwargs): tensors of `dtype` on `device`, drawn from the
CPU generator in float64. Router cases have no ties.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .operation import find_operation

Cases: TypeAlias = "Iterator[tuple[tuple, dict]]"
IGNORE = -100  # the label of a position without a loss


@dataclass
class Draw:
    """Draws standard normal tensors: in float64 on the CPU, returned in `dtype` on `device`."""

    dtype: torch.dtype
    device: str
    generator: torch.Generator

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.cast(torch.randn(*shape, generator=self.generator, dtype=torch.float64), dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1), in float64 on the CPU."""
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def cast(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return x.to(self.device, dtype or self.dtype)

    def integers(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self.device)

    @property
    def wide(self) -> torch.dtype:
        """float32 at least."""
        return torch.promote_types(torch.float32, self.dtype)


def rms_norm_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    """Rows of two axes, of one row, and wide ones."""
    draw = Draw(dtype, device, generator)
    for shape in ((2, 5, 24), (1, 1, 7), (3, 130)):
        yield (draw(*shape), 0.3 * draw(shape[-1])), {"eps": 1e-6}


def add_rms_norm_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    """The rows of `rms_norm_cases` as the residual stream, with a change."""
    draw = Draw(dtype, device, generator)
    for (x, weight), options in rms_norm_cases(dtype, device, generator):
        yield (x, draw(*x.shape), weight), options


def gated_rms_norm_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    """The rows of `rms_norm_cases` with gates."""
    draw = Draw(dtype, device, generator)
    for (x, weight), options in rms_norm_cases(dtype, device, generator):
        yield (x, draw(*x.shape), 1 + weight), options


def rotary_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    """Some of the head rotated, all of it, and enough tokens for the CPU form."""
    draw = Draw(dtype, device, generator)
    for B, T, H, G, K, half in ((2, 5, 6, 3, 16, 4), (1, 3, 2, 1, 12, 6), (2, 70, 2, 1, 12, 5)):
        query, key = draw(B, T, H, K), draw(B, T, G, K)
        angle = 6.3 * draw.uniform(B, T, half)
        yield (query, key, draw.cast(angle.cos(), draw.wide), draw.cast(angle.sin(), draw.wide)), {}


def norm_rotary_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    """Some of the head rotated, and all of it."""
    draw = Draw(dtype, device, generator)
    for B, T, H, G, K, half in ((2, 3, 4, 1, 16, 5), (1, 1, 2, 3, 12, 6)):
        angle = 6.3 * draw.uniform(B, T, half)
        rotation = draw.cast(angle.cos(), draw.wide), draw.cast(angle.sin(), draw.wide)
        yield (draw(B, T, H, K), draw(B, T, G, K), *rotation, 0.3 * draw(K), 0.3 * draw(K)), {"eps": 1e-6}


def attention_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    """A square, continued rows of different lengths, one new token, and packed documents."""
    draw = Draw(dtype, device, generator)
    sizes = [(2, 7, 7, 6, 3, 16, 0), (2, 3, 9, 4, 2, 8, 6), (3, 1, 12, 4, 1, 24, 11), (1, 10, 10, 2, 2, 8, 0)]
    for number, (B, T, P, H, G, K, start) in enumerate(sizes):
        query, key, value = draw(B, T, H, K), draw(B, P, G, K), draw(B, P, G, K)
        bounds = draw.integers([0, 1, 4, 10]) if number == 3 else None
        starts = draw.integers([start, start - 2]) if number == 1 else start
        yield (query, key, value), {"scale": K**-0.5, "starts": starts, "cu_seqlens": bounds}


def sigmoid_gate_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    """Heads, whose gates lie beside other numbers, and rows."""
    draw = Draw(dtype, device, generator)
    yield (draw(2, 3, 5, 8), draw(2, 3, 5, 2, 8)[..., 1, :]), {}
    yield (draw(7, 130), draw(7, 130)), {}


def vision_attention_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    """Frames of different sizes, an empty one, and one frame."""
    draw = Draw(dtype, device, generator)
    for bounds in ([0, 4, 5, 13], [0, 3, 3, 8, 13], [0, 13]):
        yield (draw(13, 3, 8), draw(13, 3, 8), draw(13, 3, 8)), {"cu_seqlens": draw.integers(bounds), "scale": 0.3}


def linear_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    """One row and several, with and without a bias, of two and of three axes."""
    draw = Draw(dtype, device, generator)
    for shape, F, bias in (((7, 12), 5, False), ((1, 33), 40, True), ((2, 3, 8), 65, True)):
        yield (draw(*shape), draw(F, shape[-1])), {"bias": draw(F) if bias else None}


def projections_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    """Three weights and four; few rows and several."""
    draw = Draw(dtype, device, generator)
    for shape, sizes in (((2, 1, 12), (5, 7, 3)), ((1, 33), (10, 9, 6, 2)), ((6, 8), (5, 3, 4, 7))):
        yield (draw(*shape), *(draw(F, shape[-1]) for F in sizes)), {}


def swiglu_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    """One row, few and several."""
    draw = Draw(dtype, device, generator)
    for shape, F in (((2, 1, 12), 7), ((1, 33), 40), ((6, 8), 5)):
        yield (draw(*shape), draw(F, shape[-1]), draw(F, shape[-1])), {}


def add_shared_expert_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    """Rows of two axes, of one row, and wide ones."""
    draw = Draw(dtype, device, generator)
    for shape in ((2, 5, 24), (1, 7), (3, 130)):
        yield (*(draw(*shape) for _ in range(4)), draw(1, shape[-1])), {}


def gelu_linear_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    """Both forms of gelu."""
    draw = Draw(dtype, device, generator)
    for N, D, F, approximate in ((7, 12, 5, "tanh"), (1, 33, 40, "none"), (65, 8, 3, "tanh")):
        yield (draw(N, D), draw(F, D), draw(F)), {"approximate": approximate}


def short_convolution_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    """With and without a state; packed documents, each with its own."""
    draw = Draw(dtype, device, generator)
    for B, T, C, W in ((2, 7, 12, 4), (3, 1, 5, 2), (1, 65, 10, 4)):
        x, weight, state = draw(B, T, C), draw(C, W), draw(B, C, W - 1)
        yield (x, weight), {}
        yield (x, weight), {"state": state}
        yield (x, weight), {"state": state, "lengths": draw.integers([T] * B)}
        if B == 1:
            bounds = draw.integers([0, 1, 3, 40, T])
            yield (x, weight), {"cu_seqlens": bounds, "state": state.expand(4, -1, -1).contiguous()}


def gated_delta_rule_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    """One token, lengths that are no multiple of a chunk, and packed documents."""
    draw = Draw(dtype, device, generator)
    sizes = [(2, 1, 1, 1, 8, 12), (1, 65, 2, 6, 16, 24), (2, 129, 1, 2, 12, 8), (1, 130, 2, 4, 8, 16)]
    for number, (B, T, G, H, K, V) in enumerate(sizes):
        args = draw(B, T, G, K), draw(B, T, G, K), draw(B, T, H, V)
        gate, rate = (draw(B, T, H, dtype=torch.float64) for _ in range(2))
        options = {"decay": draw.cast(-torch.exp(gate * 2 - 3), draw.wide), "beta": draw.cast(rate.sigmoid(), draw.wide)}
        if number == 3:
            options["cu_seqlens"] = draw.integers([0, 1, 64, 67, 130])
        if number != 1:
            options["state"] = draw(4 if number == 3 else B, H, K, V, dtype=draw.wide)
        yield args, options


def delta_net_step_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    """Several rows and one."""
    draw = Draw(dtype, device, generator)
    for B, G, H, K, V, W in ((3, 2, 4, 8, 12, 4), (1, 1, 3, 16, 8, 2)):
        C = 2 * G * K + H * V
        args = draw(B, C), draw(B, H, V), draw(B, H), draw(B, H)
        yield args, {
            "conv_state": draw(B, C, W - 1), "recurrent_state": draw(B, H, K, V, dtype=draw.wide),
            "conv_weight": draw(C, W), "A_log": draw(H, dtype=draw.wide), "dt_bias": draw(H, dtype=draw.wide),
            "norm_weight": draw(V, dtype=draw.wide), "groups": G, "eps": 1e-6,
        }


def router_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    """Few experts and many."""
    draw = Draw(dtype, device, generator)
    for N, D, E, top_k in ((7, 12, 5, 2), (1, 8, 16, 4)):
        yield (draw(N, D), draw(E, D)), {"top_k": top_k}


def experts_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    """Few and many tokens per expert, every expert chosen, widths that grouped_mm takes, and an active tap."""
    draw = Draw(dtype, device, generator)
    for N, D, F, E, top_k in ((7, 12, 5, 6, 2), (1, 8, 3, 4, 4), (70, 16, 8, 3, 1), (9, 24, 16, 5, 2)):
        scores = torch.rand(N, E, generator=generator)
        indices = scores.topk(top_k, dim=-1).indices.to(device)
        weights = draw.cast(draw.uniform(N, top_k))
        args = draw(N, D), draw(E, 2 * F, D), draw(E, D, F), indices, weights
        yield args, {}
        if N == 7:
            yield args, {"tap": replaced_values}


def replaced_values(name: str, value: Tensor) -> Tensor:
    """A tap that replaces the three values of the experts: an implementation that does not call it gives another result."""
    return value * {"expert_in": 0.5, "expert_act": -2.0, "expert_out": 1.5}[name]


def linear_cross_entropy_cases(dtype: torch.dtype, device: str, generator: torch.Generator) -> Cases:
    """With and without a number of items, longer than one chunk of tokens."""
    draw = Draw(dtype, device, generator)
    for N, D, vocabulary in ((7, 12, 31), (600, 5, 17)):
        hidden, weight = draw(N, D), draw(vocabulary, D)
        labels = torch.randint(0, vocabulary, (N,), generator=generator).to(device)
        labels[1] = IGNORE
        yield (hidden, weight, labels), {}
        yield (hidden, weight, labels), {"num_items": 5}


CASES: dict[str, Callable[..., Cases]] = {
    "rms_norm": rms_norm_cases,
    "add_rms_norm": add_rms_norm_cases,
    "gated_rms_norm": gated_rms_norm_cases,
    "rotary": rotary_cases,
    "norm_rotary": norm_rotary_cases,
    "attention": attention_cases,
    "sigmoid_gate": sigmoid_gate_cases,
    "vision_attention": vision_attention_cases,
    "linear": linear_cases,
    "projections": projections_cases,
    "gelu_linear": gelu_linear_cases,
    "short_convolution": short_convolution_cases,
    "gated_delta_rule": gated_delta_rule_cases,
    "delta_net_step": delta_net_step_cases,
    "router": router_cases,
    "experts": experts_cases,
    "swiglu": swiglu_cases,
    "add_shared_expert": add_shared_expert_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
}
_added: dict[str, tuple[Callable[..., object], Callable[..., Cases]]] = {}  # `add_cases`: operation -> (definition, cases)


def add_cases(operation: str, definition: Callable[..., object], cases: Callable[..., Cases]) -> None:
    """Compare an operation's implementations with another definition, on other cases."""
    _added[find_operation(operation).name] = definition, cases


def cases(operation: str) -> tuple[Callable[..., object], Callable[..., Cases]]:
    """(definition, cases) of an operation."""
    op = find_operation(operation)
    return _added.get(op.name) or (op.definition, CASES[op.name])
