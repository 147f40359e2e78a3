"""Autocast rounds the projections and nothing else: inside the operations the arithmetic stays float32 at least.

Each form gets what a layer gives it under autocast, activations in bfloat16 beside weights, gates and memories in float32,
and must answer bit for bit as it does without autocast, forward and backward. The backward runs inside the block too.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qwen35moe import backends
from qwen35moe.modules.gated_deltanet import GatedDeltaNet
from qwen35moe.ops.attention_map import attention_map, state_map
from tests.support import peer
from tests.support.peer import LINEAR, odd_shape


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=peer.generator(seed), dtype=torch.float64).to(dtype)


def rule(tokens: int) -> tuple[list[Tensor], Callable[[str], Callable[..., tuple[Tensor, ...]]]]:
    wide = torch.float32
    given = [draw(2, tokens, 3, 5), draw(2, tokens, 3, 5, seed=1), draw(2, tokens, 6, 7, seed=2)]
    given += [-draw(2, tokens, 6, seed=3, dtype=wide).exp() * 0.1, draw(2, tokens, 6, seed=4, dtype=wide).sigmoid()]
    given.append(draw(2, 6, 5, 7, seed=5, dtype=wide))

    def form(name: str) -> Callable[..., tuple[Tensor, ...]]:
        def call(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, ...]:
            with backends.use(gated_delta_rule=name):
                return backends.run("gated_delta_rule", q, k, v, decay=decay, beta=beta, state=state)

        return call

    return given, form


def gradients(call: Callable[..., tuple[Tensor, ...]], given: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in given]
    found = call(*leaves)
    cotangents = [draw(*x.shape, seed=9, dtype=x.dtype) for x in found]
    return *found, *torch.autograd.grad(found, leaves, cotangents)


def assert_untouched(call: Callable[..., tuple[Tensor, ...]], given: list[Tensor], backward: bool = True) -> None:
    run = gradients if backward else lambda call, given: call(*given)
    expected = run(call, given)
    with torch.autocast("cpu", torch.bfloat16):
        assert (draw(2, 3, dtype=torch.float32) @ draw(3, 2, dtype=torch.float32)).dtype == torch.bfloat16  # it is on
        found = run(call, given)
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["torch", "recurrent"])
@pytest.mark.parametrize("tokens", [1, 70])
def test_the_rule(tokens: int, name: str) -> None:
    given, form = rule(tokens)
    assert_untouched(form(name), given, backward=name == "torch" and tokens > 1)  # autograd's own backward is autograd's
    with torch.no_grad():
        assert_untouched(form("chunked_cpu"), given, backward=False)


def test_the_attention_map() -> None:
    given, _ = rule(20)
    q, k, _, decay, beta, _ = given
    assert_untouched(lambda q, k, decay, beta: (attention_map(q, k, decay=decay, beta=beta),), [q, k, decay, beta], False)
    assert_untouched(lambda k, decay, beta: (state_map(k, decay=decay, beta=beta),), [k, decay, beta], False)


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_the_convolution_and_the_norms(name: str) -> None:
    def convolved(x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        with backends.use(short_convolution=name):
            return backends.run("short_convolution", x, weight, state=state)

    def normed(x: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        with backends.use(gated_rms_norm=name):
            return (backends.run("gated_rms_norm", x, gate, weight, eps=1e-6),)

    def plain(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        with backends.use(rms_norm=name):
            return (backends.run("rms_norm", x, weight, eps=1e-6),)

    weight = draw(24, seed=3, dtype=torch.float32)
    assert_untouched(convolved, [draw(2, 9, 24), draw(24, 4, seed=1, dtype=torch.float32), draw(2, 24, 3, seed=2)])
    assert_untouched(normed, [draw(2, 9, 24), draw(2, 9, 24, seed=1), weight])
    assert_untouched(plain, [draw(2, 9, 24), weight], backward=name == "torch")


def test_a_layer_trains_under_autocast() -> None:
    """float32 weights, projections in bfloat16: output and gradients within bfloat16's rounding of float32's."""
    from qwen35moe.cache.layout import TokenLayout
    from qwen35moe.config import Config
    from qwen35moe.modules.context import LayerContext

    case = odd_shape(7, layer_types=[LINEAR], num_hidden_layers=1, linear_num_key_heads=2, linear_num_value_heads=6)
    layer = GatedDeltaNet(Config.from_dict(case.text).text_config)
    peer.draw(torch.nn.ModuleDict({"linear_attn": layer}), 3)
    x = draw(2, 40, case.text["hidden_size"], dtype=torch.float32)
    layout = TokenLayout((2, 40), 2, 40, torch.zeros(3, 2, 40, dtype=torch.long))
    context = LayerContext(layout, (torch.empty(0), torch.empty(0)))  # the rotation is not read

    def trained(autocast: bool) -> list[Tensor]:
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), backends.ran() as ran:
            out, state, _ = layer(x, context)
        assert ran.counts["gated_delta_rule", "torch"] == 1 and state.recurrent_state.dtype == torch.float32
        out.float().square().mean().backward()
        return [out, *(parameter.grad for parameter in layer.parameters() if parameter.grad is not None)]

    expected, found = trained(False), trained(True)
    assert len(found) == len(expected) == 10 and found[0].dtype == torch.bfloat16
    for one, two in zip(found, expected, strict=True):
        assert 0 < (one.float() - two).norm() <= 0.05 * two.norm()
