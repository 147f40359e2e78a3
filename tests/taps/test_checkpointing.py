"""Taps under activation checkpointing."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

from qwen35moe import backends, taps
from tests.taps.toy import B, CausalLM, D, Layer, T


class TestCheckpointing:
    """Gradients with activation checkpointing equal those without, whichever taps are active and whenever they end."""

    def gradients(self, model: CausalLM, ids: Tensor, checkpointing: bool, patches: dict, late: dict) -> list[Tensor]:
        model.zero_grad()
        model.model.checkpointing = checkpointing
        with taps.patch(model, patches), taps.record(model, "*") as seen:
            loss = model(ids).square().mean()
        with taps.patch(model, late), taps.record(model, "*") as seen_late:
            loss.backward()
        assert all(len(seen.all(name)) == 1 for name in seen), "recorded again"
        assert not seen_late
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    @pytest.mark.parametrize("patched", [False, True])
    @pytest.mark.parametrize("late", [False, True])
    def test_recomputes_with_the_patches_of_the_forward(
        self, model: CausalLM, ids: Tensor, patched: bool, late: bool
    ) -> None:
        patches = {"*.decay": lambda g: g * 0.5, "layers.1.output": torch.tanh} if patched else {}
        lates = {"*.decay": torch.zeros_like, "*.output": lambda x: x * 100} if late else {}
        plain = self.gradients(model, ids, False, patches, lates)
        checkpointed = self.gradients(model, ids, True, patches, lates)
        assert len(plain) == len(checkpointed) > 5
        for a, b in zip(plain, checkpointed, strict=True):
            assert torch.equal(a, b)
        if patched:
            unpatched = self.gradients(model, ids, True, {}, {})
            assert any(not torch.equal(a, b) for a, b in zip(plain, unpatched, strict=True))

    def test_recorded_values_are_on_the_graph(self, model: CausalLM, ids: Tensor) -> None:
        grads = []
        for model.model.checkpointing in (False, True):
            with taps.record(model, "layers.1.output") as seen:
                loss = model(ids).square().sum()
            grads.append(torch.autograd.grad(loss, seen["layers.1.output"])[0])
        assert torch.equal(*grads)

    def test_backward_twice(self, model: CausalLM, ids: Tensor) -> None:
        model.model.checkpointing = True
        with taps.patch(model, {"*.decay": lambda g: g * 0.5}):
            loss = model(ids).square().mean()
        first = torch.autograd.grad(loss, list(model.model.parameters()), retain_graph=True, allow_unused=True)
        again = torch.autograd.grad(loss, list(model.model.parameters()), allow_unused=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True) if a is not None and b is not None)

    def test_nested(self, ids: Tensor) -> None:
        layer, x = Layer(0, dense=True), torch.randn(B, T, D, requires_grad=True)
        inner = layer.linear_attn.forward
        layer.linear_attn.forward = lambda t: backends.checkpoint(inner, t)  # type: ignore[method-assign]
        grads = []
        for run in (lambda t: layer(t), lambda t: backends.checkpoint(layer, t)):
            with taps.patch(layer, {"linear_attn.decay": lambda g: g * 0.5}), taps.record(layer, "*") as seen:
                y = run(x)
            with taps.patch(layer, {"linear_attn.decay": torch.zeros_like}):
                grads.append(torch.autograd.grad(y.square().sum(), x)[0])
            assert all(len(seen.all(name)) == 1 for name in seen)
        assert torch.equal(*grads)

    def test_the_contexts_alone(self, model: CausalLM, ids: Tensor) -> None:
        """taps.checkpoint_contexts is enough for a function that calls no operation of `backends`."""
        layer, x = model.model.layers[0], torch.randn(B, T, D, requires_grad=True)
        calls = []
        with taps.patch(model, {"layers.0.linear_attn.decay": lambda g: calls.append(1) or g * 0.5}):
            y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, context_fn=taps.checkpoint_contexts)
        y.sum().backward()
        assert len(calls) == 2
