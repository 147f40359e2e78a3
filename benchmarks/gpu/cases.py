"""Arguments of every operation at the sizes of Qwen3.5-35B-A3B, for `checks`. `small` sizes run in Triton's interpreter.

An operation of the backends' table without cases here fails its check: a new kernel cannot be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Arguments = tuple[tuple, dict[str, Any]]


@dataclass(frozen=True)
class Sizes:
    """D: width; E experts of width F, top_k of them; G key heads and H value heads of width K in the delta rule; attention's
    query heads, key heads and head width, R of it rotated; V: vocabulary."""

    D: int = 2048
    E: int = 256
    F: int = 512
    top_k: int = 8
    G: int = 16
    H: int = 32
    K: int = 128
    heads: tuple[int, int, int] = (16, 2, 256)
    R: int = 64
    V: int = 4096
    tokens: tuple[int, int, int, int] = (1, 64, 331, 1025)
    convolved: tuple[int, ...] = (1, 64, 1025)
    rule: tuple[tuple[int, str], ...] = ((1, "ordinary"), (64, "ordinary"), (331, "ordinary"), (331, "hard"))
    batches: tuple[int, ...] = (1, 8, 64)
    loads: tuple[int, ...] = (1, 8, 100, 300, 1100)  # tokens of the experts: no sort, and every row of the tables of tiles
    vision: tuple[int, int] = (16, 72)

    @property
    def channels(self) -> int:
        return (2 * self.G + self.H) * self.K


FULL = Sizes()
SMALL = Sizes(D=48, E=6, F=24, top_k=2, G=1, H=2, K=16, heads=(3, 1, 24), R=8, V=33, tokens=(1, 5, 9, 67), convolved=(1, 9),
              rule=((5, "hard"),), batches=(3,), loads=(1, 7), vision=(2, 8))  # fmt: skip


@dataclass
class Draw:
    """Draws on the device: a tensor of the experts in float64 on a CPU would take seconds."""

    dtype: torch.dtype
    device: str
    sizes: Sizes
    training: bool

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device)
        return (x * scale).to(dtype or self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def integers(self, *values: int) -> Tensor:
        return torch.tensor(values, device=self.device)


def rms_norm(draw: Draw) -> Iterator[Arguments]:
    heads, _, width = draw.sizes.heads
    for shape in ((2, draw.sizes.tokens[-1], draw.sizes.D), (1, draw.sizes.D), (2, 3, heads, width)):
        yield (draw(*shape), draw(shape[-1], scale=0.2)), {"eps": 1e-6}


def add_rms_norm(draw: Draw) -> Iterator[Arguments]:
    for tokens in (1, draw.sizes.tokens[-1]):
        shape = (2, tokens, draw.sizes.D)
        yield (draw(*shape), draw(*shape), draw(shape[-1], scale=0.2)), {"eps": 1e-6}


def gated_rms_norm(draw: Draw) -> Iterator[Arguments]:
    s = draw.sizes
    for tokens in (1, s.tokens[-1]):
        shape = (2, tokens, s.H, s.K)
        yield (draw(*shape), draw(*shape), 1 + draw(s.K, scale=0.2, dtype=torch.float32)), {"eps": 1e-6}


def rotary(draw: Draw) -> Iterator[Arguments]:
    s, (heads, keys, width) = draw.sizes, draw.sizes.heads
    for tokens in (1, s.tokens[-1]):
        angle = 6.3 * draw.uniform(2, tokens, s.R // 2)
        yield (draw(2, tokens, heads, width), draw(2, tokens, keys, width), angle.cos(), angle.sin()), {}


def norm_rotary(draw: Draw) -> Iterator[Arguments]:
    width = draw.sizes.heads[2]
    for args, _ in rotary(draw):
        yield (*args, draw(width, scale=0.2), draw(width, scale=0.2)), {"eps": 1e-6}


def sigmoid_gate(draw: Draw) -> Iterator[Arguments]:
    """Gates that lie beside the queries of their head."""
    heads, _, width = draw.sizes.heads
    for tokens in (1, draw.sizes.tokens[2]):
        yield (draw(2, tokens, heads, width), draw(2, tokens, heads, 2, width)[..., 1, :]), {}


def attention(draw: Draw) -> Iterator[Arguments]:
    """A prompt, its continuation, one new token, also of rows of different lengths, and packed documents."""
    (heads, keys, width), most = draw.sizes.heads, draw.sizes.tokens[2]
    for T, start in ((most, 0), (most // 3, most - most // 3), (1, most)):
        kv = draw(2, start + T, keys, width), draw(2, start + T, keys, width)
        yield (draw(2, T, heads, width), *kv), {"scale": width**-0.5, "starts": start}
    for room in (most, 2 * draw.sizes.tokens[-1]):  # a static cache that rows fill in part; the kernel divides a long one
        kv = draw(2, room, keys, width), draw(2, room, keys, width)
        yield (draw(2, 1, heads, width), *kv), {"scale": width**-0.5, "starts": draw.integers(room - 1, room // 2)}
    tensors = draw(1, most, heads, width), draw(1, most, keys, width), draw(1, most, keys, width)
    yield tensors, {"scale": width**-0.5, "starts": 0, "cu_seqlens": draw.integers(0, 1, 4, most // 2 + 1, most)}


def vision_attention(draw: Draw) -> Iterator[Arguments]:
    (heads, width), most = draw.sizes.vision, draw.sizes.tokens[2]
    tensors = [draw(most, heads, width) for _ in range(3)]
    yield tuple(tensors), {"cu_seqlens": draw.integers(0, 4, most // 2, most), "scale": width**-0.5}


def linear(draw: Draw) -> Iterator[Arguments]:
    s = draw.sizes
    for tokens in (1, s.tokens[2]):
        yield (draw(tokens, s.D), draw(s.F, s.D, scale=s.D**-0.5)), {"bias": None}
    yield (draw(2, 3, s.D), draw(s.F, s.D, scale=s.D**-0.5)), {"bias": draw(s.F)}


def projections(draw: Draw) -> Iterator[Arguments]:
    """Of both mixers, for one token of a few rows and for a prompt."""
    s, (heads, keys, width) = draw.sizes, draw.sizes.heads
    for rows in (*s.batches, s.tokens[2]):
        for sizes in ((s.channels, s.H * s.K, s.H, s.H), (2 * heads * width, keys * width, keys * width)):
            yield (draw(rows, 1, s.D), *(draw(out, s.D, scale=s.D**-0.5) for out in sizes)), {}


def swiglu(draw: Draw) -> Iterator[Arguments]:
    s = draw.sizes
    for rows in (*s.batches, s.tokens[2]):
        yield (draw(rows, s.D), draw(s.F, s.D, scale=s.D**-0.5), draw(s.F, s.D, scale=s.D**-0.5)), {}


def add_shared_expert(draw: Draw) -> Iterator[Arguments]:
    s = draw.sizes
    for tokens in (1, s.tokens[-1]):
        yield (*(draw(2, tokens, s.D) for _ in range(4)), draw(1, s.D, scale=s.D**-0.5)), {}


def gelu_linear(draw: Draw) -> Iterator[Arguments]:
    s = draw.sizes
    for tokens in (1, s.tokens[2]):
        yield (draw(tokens, s.F), draw(s.K, s.F, scale=s.F**-0.5), draw(s.K)), {"approximate": "tanh"}


def short_convolution(draw: Draw) -> Iterator[Arguments]:
    """From a state, padded rows, and packed documents."""
    C, W = draw.sizes.channels, 4
    some, weight = draw.sizes.tokens[2], draw(C, W)
    for tokens in draw.sizes.convolved:
        yield (draw(2, tokens, C), weight), {"state": draw(2, C, W - 1)}
    yield (draw(3, some, C), weight), {"lengths": draw.integers(some, 1, some // 2)}
    yield (draw(1, some, C), weight), {"cu_seqlens": draw.integers(0, 1, 4, some // 2, some), "state": draw(4, C, W - 1)}


def decays(draw: Draw, gates: str, *shape: int) -> Tensor:
    """log of the share of the recurrent state that a token keeps: ordinary 0.9 to 0.999 per unit of A; hard up to e^-80."""
    if gates == "hard":
        return -torch.exp(draw.uniform(*shape) * 13.6 - 9.21)
    return -torch.exp(draw.uniform(*shape) * 4.605 - 6.908) * (1 + 15 * draw.uniform(shape[-1]))


def gated_delta_rule(draw: Draw) -> Iterator[Arguments]:
    """Lengths about the chunk's, packed documents, gates of both kinds; float32 at half the width too, for its backward."""
    s = draw.sizes
    odd = s.tokens[2]
    widths = (s.K, s.K // 2) if draw.dtype == torch.float32 and draw.training and s.K >= 32 else (s.K,)
    for K in widths:
        for T, gates in s.rule:
            yield _rule(draw, K, T), {**_gates(draw, T, gates), "state": draw(1, s.H, K, K, dtype=torch.float32)}
        options = {**_gates(draw, odd, "ordinary"), "cu_seqlens": draw.integers(0, 1, odd)}
        yield _rule(draw, K, odd), {**options, "state": draw(2, s.H, K, K, dtype=torch.float32)}


def _rule(draw: Draw, K: int, T: int) -> tuple[Tensor, ...]:
    G, H = draw.sizes.G, draw.sizes.H
    return draw(1, T, G, K), draw(1, T, G, K), draw(1, T, H, K)


def _gates(draw: Draw, T: int, gates: str) -> dict[str, Any]:
    return {"decay": decays(draw, gates, 1, T, draw.sizes.H), "beta": draw.uniform(1, T, draw.sizes.H)}


def delta_net_step(draw: Draw) -> Iterator[Arguments]:
    s, W = draw.sizes, 4
    C = s.channels
    for B in s.batches:
        yield (draw(B, C), draw(B, s.H, s.K), draw(B, s.H), draw(B, s.H)), {
            "conv_state": draw(B, C, W - 1), "recurrent_state": draw(B, s.H, s.K, s.K, dtype=torch.float32),
            "conv_weight": draw(C, W, scale=0.3), "A_log": (1 + 15 * draw.uniform(s.H)).log(),
            "dt_bias": -6 + 4 * draw.uniform(s.H), "norm_weight": 1 + draw(s.K, scale=0.2, dtype=torch.float32),
            "groups": s.G, "eps": 1e-6,
        }  # fmt: skip


def router(draw: Draw) -> Iterator[Arguments]:
    """Logits that bfloat16 holds exactly, 1/32 apart: no ties, so that the indices must be equal."""
    s = draw.sizes
    levels = (torch.arange(s.E, device=draw.device) - s.E // 2) / 32
    order = torch.stack([torch.randperm(s.E, generator=draw.generator, device=draw.device) for _ in range(s.D)])
    weight = levels[order].mT.contiguous().to(draw.dtype)
    for tokens in (1, s.tokens[-1]):
        hidden = torch.zeros(tokens, s.D, device=draw.device)
        hidden[torch.arange(tokens, device=draw.device), torch.arange(tokens, device=draw.device) * 7 % s.D] = 1
        yield (hidden.to(draw.dtype), weight), {"top_k": s.top_k}


def experts(draw: Draw) -> Iterator[Arguments]:
    """Without gradients all experts, with gradients a quarter: the definition's backward writes zeros for every one of them.

    Loads of every expert, and of one expert alone.
    """
    s = draw.sizes
    E = s.E if not draw.training or s.E < 64 else s.E // 4
    gate_up, down = draw(E, 2 * s.F, s.D, scale=s.D**-0.5), draw(E, s.D, s.F, scale=s.F**-0.5)
    for tokens in s.loads:
        scores = draw.uniform(tokens, E)
        if tokens == s.loads[1]:
            scores[:, : s.top_k] += 1  # all to the same experts
        weights = draw.uniform(tokens, s.top_k).softmax(-1).to(draw.dtype)
        yield (draw(tokens, s.D), gate_up, down, scores.topk(s.top_k).indices, weights), {}


def linear_cross_entropy(draw: Draw) -> Iterator[Arguments]:
    s, tokens = draw.sizes, draw.sizes.tokens[2]
    labels = torch.randint(0, s.V, (tokens,), generator=draw.generator, device=draw.device)
    labels[1] = -100
    yield (draw(tokens, s.D), draw(s.V, s.D, scale=s.D**-0.5), labels), {}


CASES: dict[str, Callable[[Draw], Iterator[Arguments]]] = {
    function.__name__: function
    for function in (rms_norm, add_rms_norm, gated_rms_norm, rotary, norm_rotary, attention, sigmoid_gate, vision_attention,
                     linear, projections, gelu_linear, short_convolution, gated_delta_rule, delta_net_step, router, experts,
                     swiglu, add_shared_expert, linear_cross_entropy)
}  # fmt: skip
