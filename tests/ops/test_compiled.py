"""torch.compile and torch.export of operations: one graph for many lengths, and the rules of torch.library."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

from qwen35moe import backends, ops
from qwen35moe.backends.cases import CASES
from qwen35moe.backends.operation import TABLE
from tests.support.peer import assert_close, generator


def draw(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    return torch.randn(shape, generator=generator(seed)).requires_grad_(grad)


def library_calls() -> dict[str, tuple[Any, tuple]]:
    """Operators of torch.library and arguments: with gradients, non-contiguous, packed, with and without a state."""
    library = torch.ops.qwen35moe
    rule, loss, experts = library.chunked_gated_delta_rule, library.linear_cross_entropy, library.experts
    qkv = draw(1, 37, 2, 8), draw(1, 37, 2, 8, seed=1), draw(1, 37, 4, 6, seed=2)
    gates = (-0.1 * torch.rand(1, 37, 4)).requires_grad_(), torch.rand(1, 37, 4).requires_grad_()
    strided = tuple(x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in qkv)
    bounds, labels = torch.tensor([0, 5, 5, 37]), torch.tensor([3, -100, 1, 7, 0, 2, 9])
    indices = torch.tensor([[0, 2], [1, 0], [2, 0], [0, 1], [1, 2]])
    grouped = draw(3, 14, 8, seed=3), draw(3, 8, 7, seed=4), indices, torch.rand(5, 2).requires_grad_()
    return {
        "rule": (rule.default, (*qkv, *gates, None, None, 16)),
        "rule, strided, packed, state": (rule.default, (*strided, *gates, draw(3, 4, 8, 6), bounds, 16)),
        "loss": (loss.default, (draw(7, 6), draw(11, 6, seed=1), labels)),
        "loss, strided": (loss.default, (draw(6, 7).T, draw(6, 11, seed=1).T, labels)),
        "experts": (experts.default, (draw(5, 8), *grouped, True)),
        "experts, nothing kept": (experts.default, (draw(5, 8, grad=False), *(x.detach() for x in grouped), False)),
    }


@pytest.mark.parametrize("name", library_calls())
def test_an_operator_keeps_the_rules_of_torch_library(name: str) -> None:
    """Schema, autograd registration, shapes and strides of the fake form, and AOT autograd with symbolic sizes."""
    operator, args = library_calls()[name]
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(operator, args, test_utils=utilities)


class Call(nn.Module):
    """An operation as a module, for torch.export."""

    def __init__(self, name: str, kwargs: dict) -> None:
        super().__init__()
        self.op, self.kwargs = TABLE[name], kwargs

    def forward(self, *args: Tensor) -> Any:
        return self.op(*args, **self.kwargs)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", [name for name in backends.OPERATIONS if name != "delta_net_step"])
def test_one_graph_for_many_lengths_with_gradients(name: str) -> None:
    """fullgraph=True: no break, and no third graph for a third length."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(TABLE[name], backend=backend, fullgraph=True)
    for length in (17, 21, 27):  # up to 16 tokens the delta rule takes shorter chunks, in a graph of their own
        args, kwargs = with_tokens(name, length)
        leaves = [[x.clone().requires_grad_() if x.is_floating_point() else x for x in args] for _ in range(2)]
        outputs = [first(fn(*values, **kwargs)) for fn, values in zip((compiled, TABLE[name]), leaves, strict=True)]
        assert_close(outputs[0], outputs[1], 1e-5)
        floats = [[x for x in values if x.requires_grad] for values in leaves]
        unused = {"allow_unused": True, "materialize_grads": True}
        gradients = [torch.autograd.grad(out.sum(), x, **unused) for out, x in zip(outputs, floats, strict=True)]
        for a, b in zip(*gradients, strict=True):
            assert_close(a, b, 2e-5) if b.any() else None
    assert len(graphs) <= 2


def with_tokens(name: str, T: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Arguments with T tokens."""
    x, gate = draw(T, 8, grad=False), draw(T, 8, seed=1, grad=False)
    if name in ("attention", "gated_delta_rule"):
        args = draw(2, T, 4, 6, grad=False), draw(2, T, 2, 6, seed=1, grad=False), draw(2, T, 2, 6, seed=2, grad=False)
        gates = torch.rand(2, 2, T, 4, generator=generator(3))
        wide = draw(2, T, 4, 5, seed=4, grad=False)
        rule = (args[1], args[2], wide), {"decay": -0.1 * gates[0], "beta": gates[1]}
        return (args, {"scale": 0.3}) if name == "attention" else rule
    if name == "vision_attention":
        frames = {"cu_seqlens": torch.tensor([0, 5, 12]), "scale": 0.3}
        return tuple(draw(12, 2, 6, seed=n, grad=False) for n in range(3)), frames
    indices = torch.rand(T, 3, generator=generator(5)).topk(2).indices
    angle = torch.rand(2, T, 3, generator=generator(6))
    return {
        "rms_norm": ((x, gate[0]), {"eps": 1e-6}), "gated_rms_norm": ((x, gate, gate[0]), {"eps": 1e-6}),
        "add_rms_norm": ((x, gate, gate[0]), {"eps": 1e-6}),
        "projections": ((x, draw(5, 8, grad=False), draw(3, 8, seed=1, grad=False), draw(4, 8, seed=2, grad=False)), {}),
        "swiglu": ((x, draw(5, 8, grad=False), draw(5, 8, seed=1, grad=False)), {}),
        "add_shared_expert": ((x, gate, 0.5 * gate, x.flip(0), gate[:1]), {}),
        "sigmoid_gate": ((x, gate), {}),
        "linear": ((x, draw(5, 8, grad=False), gate[0, :5]), {}),
        "rotary": ((draw(2, T, 4, 8, grad=False), draw(2, T, 2, 8, grad=False), angle.cos(), angle.sin()), {}),
        "norm_rotary": (
            (draw(2, T, 4, 8, grad=False), draw(2, T, 2, 8, grad=False), angle.cos(), angle.sin(), x[0], gate[0]), {"eps": 1e-6}
        ),
        "gelu_linear": ((x, draw(5, 8, grad=False), gate[0, :5]), {"approximate": "tanh"}),
        "short_convolution": ((x[None], draw(8, 4, grad=False)), {}), "router": ((x, draw(7, 8, grad=False)), {"top_k": 2}),
        "experts": ((x, draw(3, 10, 8, grad=False), draw(3, 8, 5, grad=False), indices, gate[:, :2]), {}),
        "linear_cross_entropy": ((x, draw(11, 8, grad=False), torch.arange(T) % 11), {}),
    }[name]  # fmt: skip


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["attention", "vision_attention", "short_convolution", "gated_delta_rule"])
def test_packed_documents_compile_whole_and_their_bounds_are_no_constants(name: str) -> None:
    graphs = []
    compiled = torch.compile(TABLE[name], backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True)
    for bounds in ([0, 5, 17], [0, 11, 17]):
        args, kwargs = with_tokens(name, 17)
        if name in ("attention", "gated_delta_rule"):
            args = tuple(x[:1] for x in args)
            kwargs = {key: x[:1] if isinstance(x, Tensor) else x for key, x in kwargs.items()}
        kwargs["cu_seqlens"] = torch.tensor([min(n, 12) for n in bounds] if name == "vision_attention" else bounds)
        assert_close(first(compiled(*args, **kwargs)), first(TABLE[name].definition(*args, **kwargs)), 1e-5)
    assert len(graphs) == 1


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", [name for name in backends.OPERATIONS if name != "vision_attention"])
def test_torch_export_of_an_operation(name: str) -> None:
    args, kwargs = next(case for case in CASES[name](torch.float32, "cpu", generator(0)) if case[1].get("tap") is None)
    with torch.no_grad():
        program = torch.export.export(Call(name, kwargs), args)
        actual, expected = program.module()(*args), TABLE[name](*args, **kwargs)
    assert_close(first(actual), first(expected), 1e-5)


def test_a_second_derivative_of_the_compiled_form_is_no_silent_zero() -> None:
    hidden, weight = draw(5, 6), draw(9, 6, seed=1)
    compiled = torch.compile(lambda h, w: ops.linear_cross_entropy(h, w, torch.arange(5)), backend="aot_eager", fullgraph=True)
    (first_order,) = torch.autograd.grad(compiled(hidden, weight), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward|does not require grad"):
        torch.autograd.grad(first_order.sum(), hidden)
