"""The programs of every launch do not race, and their offsets suffice for 262,144 tokens and 256 experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.support.traces import Trace, traced

pytest.importorskip("triton")
from qwen35moe_kernels import runtime  # noqa: E402

if not runtime.interpreted():
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def unfilled() -> Iterator[None]:
    """torch.empty does not touch its memory, which the suite otherwise fills with NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before


def ints(*values: int) -> Tensor:
    return torch.tensor(values)


def delta_rule(new: Callable[..., Tensor], tokens: int, bounds: Tensor | None, rows: int, sizes: tuple[int, ...]) -> None:
    from qwen35moe_kernels.delta_rule import delta_rule as forward
    from qwen35moe_kernels.delta_rule import delta_rule_back

    G, H, K, V = sizes
    query, key, value = new(rows, tokens, G, K), new(rows, tokens, G, K), new(rows, tokens, H, V)
    decay, beta = new(rows, tokens, H).float().neg_(), new(rows, tokens, H)
    state = torch.zeros(rows if bounds is None else len(bounds) - 1, H, K, V)
    output, final, *saved = forward._init_fn(query, key, value, decay, beta, state, bounds)
    delta_rule_back._init_fn(new(*output.shape), torch.zeros_like(final), query, key, value, beta, bounds, *saved)


def convolution(
    new: Callable[..., Tensor], rows: int, tokens: int, lengths: Tensor | None, bounds: Tensor | None, C: int
) -> None:
    from qwen35moe_kernels import convolution as module

    x, weight, states = new(rows, tokens, C), new(C, 4), new(rows if bounds is None else len(bounds) - 1, C, 3)
    module._forward(x, weight, states, lengths, bounds)
    module._backward(new(*x.shape), torch.empty_like(states), x, weight, states, lengths, bounds)


def experts(new: Callable[..., Tensor], indices: Tensor, E: int, D: int, F: int, keep: bool = True) -> None:
    from qwen35moe_kernels import experts as module

    hidden, gate_up, down, weights = new(len(indices), D), new(E, 2 * F, D), new(E, D, F), new(*indices.shape)
    _, pre, order = module._forward(hidden, gate_up, down, indices, weights, keep)
    if keep:
        module._backward(new(*hidden.shape), hidden, gate_up, down, indices, weights, pre, order, [True] * 3)


def decoder(new: Callable[..., Tensor], rows: int, tokens: int, sizes: tuple[int, ...]) -> None:
    """Norms, rotation and router."""
    from qwen35moe_kernels import gated_norm, norm, rotary, router

    width, G, H, K, V, E, top_k = sizes
    for shape in ((rows, tokens, width), (rows, tokens, H, K)):
        x, weight = new(*shape), new(shape[-1])
        norm.rms_norm(x, weight, eps=1e-6)
        norm._backward(x, x, weight, 1e-6)
    x, weight = new(rows, tokens, H, V), new(V)
    gated_norm.gated_rms_norm(x, x, weight, eps=1e-6)
    gated_norm._backward(x, x, x, weight, 1e-6)
    router._choose(new(rows * tokens, E), top_k)
    angles = new(rows, tokens, K // 8)
    rotary.rotary(new(rows, tokens, H, K), new(rows, tokens, G, K), angles, angles)


def step(new: Callable[..., Tensor], batch: int, G: int, H: int, K: int, V: int) -> None:
    from qwen35moe_kernels.step import delta_net_step

    C = 2 * G * K + H * V
    gates = new(batch, H, V), new(batch, H), new(batch, H)
    states = {"conv_state": new(batch, C, 3), "recurrent_state": torch.empty(batch, H, K, V), "conv_weight": new(C, 4)}
    one = {"A_log": new(H), "dt_bias": new(H), "norm_weight": new(V)}
    delta_net_step(new(batch, C), *gates, **states, **one, groups=G, eps=1e-6)


SMALL: dict[str, Callable[[Callable[..., Tensor]], None]] = {
    "delta_rule": lambda new: delta_rule(new, 10, None, 2, (1, 2, 12, 40)),
    "delta_rule, packed": lambda new: delta_rule(new, 68, ints(0, 0, 3, 68), 1, (1, 2, 12, 20)),
    "convolution": lambda new: convolution(new, 2, 37, None, None, 144),
    "convolution, lengths": lambda new: convolution(new, 2, 37, ints(37, 5), None, 144),
    "convolution, packed": lambda new: convolution(new, 1, 37, None, ints(0, 1, 4, 37), 144),
    "convolution, one token": lambda new: convolution(new, 3, 1, None, None, 144),
    "experts, few": lambda new: experts(new, torch.rand(2, 7).topk(3).indices, 7, 40, 24, False),
    "experts": lambda new: experts(new, torch.rand(90, 7).topk(3).indices, 7, 40, 24),
    "decoder": lambda new: decoder(new, 2, 5, (40, 2, 4, 16, 24, 7, 3)),
    "step": lambda new: step(new, 3, 2, 4, 16, 24),
}


def judge(trace: Trace, least: int) -> None:
    assert len(trace.launches) >= least and all(launch.stored for launch in trace.launches)
    assert not [launch for launch in trace.launches if launch.races or launch.outside]


@pytest.mark.slow  # another processor changes nothing here
@pytest.mark.parametrize("case", SMALL)
def test_no_two_programs_touch_what_one_writes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("norm", "gated_norm"):  # so that a program of the backward has several blocks
        monkeypatch.setattr(f"qwen35moe_kernels.{name}._PROGRAMS", 2)
    monkeypatch.setattr("qwen35moe_kernels.step._COLUMNS", 16)
    with traced() as trace:
        SMALL[case](lambda *shape: torch.randn(shape))
    judge(trace, 1)
    assert any(launch.programs > 1 for launch in trace.launches)


TOKENS, EXPERTS, TOP_K = 262144, 256, 8


def choices() -> Tensor:
    """[TOKENS, TOP_K]: each expert has one row more than a multiple of 128, so that no tile of the schedule is unused."""
    counts = 1 + 128 * torch.tensor([64] * 254 + [63] * 2)
    return torch.arange(EXPERTS).repeat_interleave(counts).view(TOKENS, TOP_K)


# The documents' chunks, of 64 tokens, are as many as there can be: the last program has one.
LARGE: dict[str, Callable[[Callable[..., Tensor]], None]] = {
    "delta_rule": lambda new: delta_rule(new, TOKENS + 2, ints(0, TOKENS - 63, TOKENS + 2), 1, (16, 32, 128, 128)),
    "convolution": lambda new: convolution(new, 1, TOKENS + 128, None, None, 8192),
    "convolution, packed": lambda new: convolution(new, 1, TOKENS + 128, None, ints(0, TOKENS, TOKENS + 128), 8192),
    "decoder": lambda new: decoder(new, 1, TOKENS + 64, (8192, 2, 64, 256, 128, EXPERTS, TOP_K)),
    "step": lambda new: step(new, 4400, 16, 32, 128, 128),
    "experts": lambda new: experts(new, choices(), EXPERTS, 2048, 512),
    "experts, few": lambda new: experts(new, torch.arange(192, 256).view(8, 8), EXPERTS, 2048, 512, False),
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case == "decoder")) for case in LARGE])
def test_offsets_of_the_last_program(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.empty_like  # row_of of the experts' schedule, which one program does not fill
    monkeypatch.setattr(torch, "empty_like", lambda x: real(x) if x.is_floating_point() else torch.full_like(x, x.numel() - 1))
    monkeypatch.setattr("qwen35moe_kernels.convolution._TOKENS_BACKWARD", 512)  # fewer blocks in the last program's loop
    for name in ("norm", "gated_norm"):
        monkeypatch.setattr(f"qwen35moe_kernels.{name}._PROGRAMS", 8192)
    with traced(last=True) as trace:
        LARGE[case](lambda *shape: torch.empty(shape, dtype=BF16))
    judge(trace, 1)
