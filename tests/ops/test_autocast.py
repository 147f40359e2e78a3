"""Autocast affects the projections only: inside the operations the arithmetic is float32 at least.

The forms get the inputs that a layer passes under autocast: bfloat16 activations, float32 weights, gates and states. Outputs
and gradients equal those without autocast bit for bit. The backward also runs inside the autocast block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qwen35moe import backends
from qwen35moe.backends.operation import TABLE
from qwen35moe.config import Config
from qwen35moe.modules.gated_deltanet import GatedDeltaNet
from qwen35moe.modules.moe import Experts
from qwen35moe.ops.attention_map import attention_map, state_map
from tests.support import peer
from tests.support.configs import TINY
from tests.support.peer import LINEAR, odd_shape


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return peer.randn(*shape, seed=seed, dtype=dtype)


def delta_rule_inputs(tokens: int) -> tuple[list[Tensor], Callable[[str], Callable[..., tuple[Tensor, ...]]]]:
    wide = torch.float32
    inputs = [draw(2, tokens, 3, 5), draw(2, tokens, 3, 5, seed=1), draw(2, tokens, 6, 7, seed=2)]
    inputs += [-draw(2, tokens, 6, seed=3, dtype=wide).exp() * 0.1, draw(2, tokens, 6, seed=4, dtype=wide).sigmoid()]
    inputs.append(draw(2, 6, 5, 7, seed=5, dtype=wide))

    def form(name: str) -> Callable[..., tuple[Tensor, ...]]:
        def call(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, ...]:
            with backends.use(gated_delta_rule=name):
                return backends.run("gated_delta_rule", q, k, v, decay=decay, beta=beta, state=state)

        return call

    return inputs, form


def outputs_and_gradients(call: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = call(*leaves)
    cotangents = [draw(*x.shape, seed=9, dtype=x.dtype) for x in outputs]
    return *outputs, *torch.autograd.grad(outputs, leaves, cotangents)


def assert_unaffected(call: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], backward: bool = True) -> None:
    run = outputs_and_gradients if backward else lambda call, inputs: call(*inputs)
    expected = run(call, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert (draw(2, 3, dtype=torch.float32) @ draw(3, 2, dtype=torch.float32)).dtype == torch.bfloat16  # autocast is active
        actual = run(call, inputs)
    assert [x.dtype for x in actual] == [x.dtype for x in expected]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", ["torch", "recurrent"])
@pytest.mark.parametrize("tokens", [1, 70])
def test_the_delta_rule(tokens: int, name: str) -> None:
    inputs, form = delta_rule_inputs(tokens)
    assert_unaffected(form(name), inputs, backward=name == "torch" and tokens > 1)  # the recurrence has autograd's backward
    with torch.no_grad():
        assert_unaffected(form("chunked_cpu"), inputs, backward=False)


def test_the_attention_map() -> None:
    inputs, _ = delta_rule_inputs(20)
    q, k, _, decay, beta, _ = inputs
    assert_unaffected(lambda q, k, decay, beta: (attention_map(q, k, decay=decay, beta=beta),), [q, k, decay, beta], False)
    assert_unaffected(lambda k, decay, beta: (state_map(k, decay=decay, beta=beta),), [k, decay, beta], False)


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_the_convolution_and_the_norms(name: str) -> None:
    def convolution(x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        with backends.use(short_convolution=name):
            return backends.run("short_convolution", x, weight, state=state)

    def gated_norm(x: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        with backends.use(gated_rms_norm=name):
            return (backends.run("gated_rms_norm", x, gate, weight, eps=1e-6),)

    def norm(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        with backends.use(rms_norm=name):
            return (backends.run("rms_norm", x, weight, eps=1e-6),)

    weight = draw(24, seed=3, dtype=torch.float32)
    assert_unaffected(convolution, [draw(2, 9, 24), draw(24, 4, seed=1, dtype=torch.float32), draw(2, 24, 3, seed=2)])
    assert_unaffected(gated_norm, [draw(2, 9, 24), draw(2, 9, 24, seed=1), weight])
    assert_unaffected(norm, [draw(2, 9, 24), weight], backward=name == "torch")


def test_a_layer_trains_under_autocast() -> None:
    """With bfloat16 projections, output and gradients are within bfloat16 rounding of those in float32."""
    from qwen35moe.cache.layout import TokenLayout
    from qwen35moe.modules.context import LayerContext

    case = odd_shape(7, layer_types=[LINEAR], num_hidden_layers=1, linear_num_key_heads=2, linear_num_value_heads=6)
    layer = GatedDeltaNet(Config.from_dict(case.text).text_config)
    peer.draw(torch.nn.ModuleDict({"linear_attn": layer}), 3)
    x = draw(2, 40, case.text["hidden_size"], dtype=torch.float32)
    layout = TokenLayout((2, 40), 2, 40, torch.zeros(3, 2, 40, dtype=torch.long))
    context = LayerContext(layout, (torch.empty(0), torch.empty(0)))  # a delta-net layer does not read the rotation

    def output_and_gradients(autocast: bool) -> list[Tensor]:
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), backends.ran() as ran:
            out, state, _ = layer(x, context)
        assert ran.counts["gated_delta_rule", "torch"] == 1 and state.recurrent_state.dtype == torch.float32
        out.float().square().mean().backward()
        return [out, *(parameter.grad for parameter in layer.parameters() if parameter.grad is not None)]

    expected, actual = output_and_gradients(False), output_and_gradients(True)
    assert len(actual) == len(expected) == 10 and actual[0].dtype == torch.bfloat16
    for a, b in zip(actual, expected, strict=True):
        assert 0 < (a.float() - b).norm() <= 0.05 * b.norm()


PRODUCTS: dict[str, tuple[tuple[int, ...], ...]] = {
    "linear": ((7, 16), (12, 16)), "gelu_linear": ((7, 16), (12, 16), (12,)), "router": ((7, 16), (5, 16)),
    "linear_cross_entropy": ((7, 16), (12, 16)),
}  # fmt: skip

OPTIONS: dict[str, dict[str, Any]] = {"gelu_linear": {"approximate": "none"}, "router": {"top_k": 2}}


@pytest.mark.parametrize("operation", PRODUCTS)
def test_operations_of_one_product_follow_autocast(operation: str) -> None:
    """As F.linear does: with float32 inputs they compute the product in bfloat16, where every form takes it."""
    args = [draw(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(PRODUCTS[operation])]
    options = OPTIONS.get(operation, {})
    if operation == "linear_cross_entropy":
        args.append(torch.tensor([3, -100, 0, 11, 5, 6, 1]))
    definition: Callable[..., object] = TABLE[operation].definition
    low = [x.bfloat16() if x.is_floating_point() else x for x in args]
    expected = tree_leaves(definition(*low, **options))
    for entry in backends.implementations(operation):
        with torch.autocast("cpu", torch.bfloat16), backends.use(**{operation: entry.name}):
            try:
                actual = tree_leaves(backends.run(operation, *args, **options))
            except ValueError as error:  # a form that does not take autocast
                assert "cannot run" in str(error)
                continue
        for a, b in zip(actual, expected, strict=True):
            bound = 0.01 * b.float().norm() if b.is_floating_point() else 0
            assert (a.float() - b.float()).norm() <= bound


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_experts_follow_autocast(weights_dtype: torch.dtype) -> None:
    """In the dtype of a linear map, bit for bit as the layer with all tensors in it; gradients reach the float32 weights."""
    config = Config.from_dict(TINY).text_config
    experts = Experts(config)
    for seed, parameter in enumerate(experts.parameters()):
        parameter.data = draw(*parameter.shape, seed=seed, dtype=weights_dtype) * 0.2
    hidden, weights = draw(9, TINY["hidden_size"], seed=5, dtype=weights_dtype), draw(9, 2, seed=6, dtype=weights_dtype).abs()
    indices = torch.arange(18).view(9, 2) % 7
    with torch.autocast("cpu", torch.bfloat16):
        linear = torch.nn.functional.linear(hidden, experts.gate_up_proj[0])
        out = experts(hidden, indices, weights)
    assert out.dtype == linear.dtype
    out.float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == weights_dtype for parameter in experts.parameters())
    with torch.no_grad():
        low = Experts(config).to(linear.dtype)
        for a, b in zip(low.parameters(), experts.parameters(), strict=True):
            a.copy_(b)
        with torch.autocast("cpu", torch.bfloat16):  # without a gradient, as below
            assert torch.equal(low(hidden.to(linear.dtype), indices, weights), experts(hidden, indices, weights))
            # Of fewer assignments than experts only the experts in them are cast.
            assert torch.equal(
                low(hidden[:3].to(linear.dtype), indices[:3], weights[:3]), experts(hidden[:3], indices[:3], weights[:3])
            )
