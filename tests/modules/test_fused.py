"""Where modules run a fused implementation in place of several operations, and where something attached keeps them from it.

The implementations of this file call the definitions, in place of the kernels of a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen35moe import Config, Qwen3_5MoeForCausalLM, backends, taps
from qwen35moe.backends.operation import TABLE
from tests.support.configs import TWO_LAYERS

FUSED = ("add_rms_norm", "projections", "norm_rotary", "sigmoid_gate", "swiglu", "add_shared_expert")
# Calls in one forward of two layers, one with attention.
CALLS = {"add_rms_norm": 2, "projections": 2, "norm_rotary": 1, "sigmoid_gate": 1, "swiglu": 2, "add_shared_expert": 2}


@pytest.fixture
def model() -> Qwen3_5MoeForCausalLM:
    """A layer of each kind."""
    return Qwen3_5MoeForCausalLM(Config.from_dict(TWO_LAYERS)).init_weights(seed=3)


@pytest.fixture(autouse=True)
def implementations() -> Iterator[None]:
    """An implementation "fused" of each of these operations."""
    for name in FUSED:
        operation = TABLE[name]
        backends.register(name, "fused", lambda *args, operation=operation, **kw: operation.definition(*args, **kw))
    yield
    for name in FUSED:
        backends.unregister(name, "fused")


def logits(model: nn.Module, implementation: str, ids: Tensor | None = None) -> tuple[Tensor, dict[str, int]]:
    """The logits, and how often the implementation "fused" of each operation ran."""
    with backends.use(**dict.fromkeys(FUSED, implementation)), backends.ran() as ran:
        out = model(torch.tensor([[5, 9, 7]]) if ids is None else ids).logits
    return out, {name: ran.counts[name, "fused"] for name in FUSED}


def assert_equal(fused: Tensor, composed: Tensor) -> None:
    assert (fused - composed).abs().max() <= 1e-5 * composed.abs().max()


@torch.no_grad()
def test_a_forward_with_all_of_them(model: Qwen3_5MoeForCausalLM) -> None:
    fused, counts = logits(model, "fused")
    composed, none = logits(model, "torch")
    assert counts == CALLS and not any(none.values())
    assert_equal(fused, composed)


def test_with_gradients_the_modules_compose_the_operations(model: Qwen3_5MoeForCausalLM) -> None:
    fused, counts = logits(model, "fused")
    assert fused.requires_grad and not any(counts.values())


@torch.no_grad()
def test_a_chosen_part_is_called(model: Qwen3_5MoeForCausalLM) -> None:
    """rms_norm by name: no operation that contains it runs a fused implementation of its own accord."""
    for part, without in (("rms_norm", ("add_rms_norm", "norm_rotary")), ("linear", ("projections", "swiglu"))):
        with backends.use(**{part: "torch"}), backends.ran() as ran:
            model(torch.tensor([[5, 9, 7]]))
        names = {operation for operation, _ in ran.counts}
        assert part in names and not names & set(without)


PARTS = {  # a module of layer 1 -> the operations that replace its call, and so step aside
    "post_attention_layernorm": ["add_rms_norm"], "self_attn.k_norm": ["norm_rotary"], "self_attn.v_proj": ["projections"],
    "mlp.shared_expert.up_proj": ["swiglu"], "mlp.shared_expert_gate": ["add_shared_expert"], "mlp": ["add_shared_expert"],
    "mlp.shared_expert": [], "self_attn": [], "mlp.shared_expert.down_proj": [],
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("change", ["hook", "pre-hook", "forward", "a module around it"])
@pytest.mark.parametrize("name", PARTS)
def test_what_is_attached_to_a_module_takes_effect(model: Qwen3_5MoeForCausalLM, name: str, change: str) -> None:
    plain, _ = logits(model, "torch")
    attach(model.model.layers[1], name, change)
    fused, counts = logits(model, "fused")
    composed, _ = logits(model, "torch")
    assert_equal(fused, composed)
    assert (fused - plain).abs().max() > 1e-3 * plain.abs().max(), "the change must matter"
    assert counts == {operation: count - (operation in PARTS[name]) for operation, count in CALLS.items()}


def attach(layer: nn.Module, name: str, change: str) -> None:
    """Makes the output of a part of the layer another one."""

    def scaled(output: Any) -> Any:
        return (1.25 * output[0] + 0.2, *output[1:]) if isinstance(output, tuple) else 1.25 * output + 0.2

    class Around(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return scaled(self.inner(*args, **kwargs))

    part = layer.get_submodule(name)
    if change == "hook":
        part.register_forward_hook(lambda module, args, output: scaled(output))
    elif change == "pre-hook":
        part.register_forward_pre_hook(lambda module, args: (4.0 * args[0] + 3.0, *args[1:]))
    elif change == "forward":
        forward = part.forward
        part.forward = lambda *args, **kwargs: scaled(forward(*args, **kwargs))
    else:
        parent, _, own = name.rpartition(".")
        setattr(layer.get_submodule(parent), own, Around(part))


@torch.no_grad()
@pytest.mark.parametrize("value", ["shared", "output", "routed"])
def test_a_tapped_value_is_materialised(model: Qwen3_5MoeForCausalLM, value: str) -> None:
    def run(implementation: str) -> tuple[Tensor, dict[str, int], dict[str, Tensor]]:
        places = {f"layers.1.mlp.{value}": lambda x: 1.5 * x}
        with taps.patch(model, places), taps.record(model, f"layers.*.mlp.{value}") as values:
            out, counts = logits(model, implementation)
            return out, counts, {key: values[key] for key in values}

    fused, counts, values = run("fused")
    composed, _, expected = run("torch")
    assert_equal(fused, composed)
    assert len(values) == 2
    for key in expected:
        assert_equal(values[key], expected[key])
    assert counts == CALLS | {"add_shared_expert": 2 if value == "routed" else 0}


@torch.no_grad()
def test_a_part_in_another_dtype_and_norms_of_different_epsilons(model: Qwen3_5MoeForCausalLM) -> None:
    """The residual stream keeps its dtype, and one launch normalises queries and keys only with one epsilon."""
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[0].mlp
    mlp.double()
    attention.k_norm.eps = 0.5
    fused, counts = logits(model, "fused")
    composed, _ = logits(model, "torch")
    assert_equal(fused, composed)
    assert counts["norm_rotary"] == 0 and fused.dtype == torch.float32
