"""nnsight, plain hooks and torch.func.functional_call: values inside the model are seen and replaced."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.integrations.common import KINDS, cached_logits, tiny, tokens, twin
from tests.support import memory
from tests.support.peer import relative_error

WANTED = ("model.layers.0.mlp", "model.layers.1.self_attn.o_proj", "model.norm", "lm_head")


@torch.no_grad()
def seen_by_hooks(model: Any, names: tuple[str, ...] = WANTED, **call: Any) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: seen.__setitem__(name, out))
        for name in names
    ]
    model(tokens(), **call)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_hooks_see_the_values_that_they_name(kind: str) -> None:
    model = tiny(kind)
    seen = seen_by_hooks(model)
    output = model(tokens(), output_hidden_states=True)
    assert torch.equal(seen["lm_head"], output.logits)
    assert torch.equal(seen["model.norm"], output.hidden_states[-1])
    assert torch.equal(model.lm_head(seen["model.norm"]), output.logits)


@torch.no_grad()
def test_a_hook_that_replaces_a_value_reaches_the_logits() -> None:
    model = tiny()
    for name in ("model.layers.0.mlp.experts", "model.layers.0.linear_attn.conv1d", "model.layers.1.self_attn.k_norm",
                 "model.layers.0.linear_attn.norm", "model.layers.0.mlp.shared_expert_gate"):  # fmt: skip
        plain = model(tokens()).logits

        def doubled(module: nn.Module, args: Any, out: Any) -> Any:
            return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out

        handle = model.get_submodule(name).register_forward_hook(doubled)
        whole, cached = model(tokens()).logits, cached_logits(model, model.new_cache(2))
        handle.remove()
        assert relative_error(whole, plain) > 1e-3, name
        assert relative_error(cached, whole) < 2e-5, name
        assert torch.equal(model(tokens()).logits, plain)


@pytest.mark.parametrize("returns", ["one tensor", "all arguments", "a new forward"])
@torch.no_grad()
def test_a_hook_on_the_input_of_the_feed_forward_reaches_its_router(returns: str) -> None:
    """As in transformers, where the router is called inside; forced routing still holds, in every form."""
    pytest.importorskip("transformers")
    model, forced = tiny("router loss"), tiny()(tokens(seed=4), output_routing=True).routing
    theirs = twin(model)

    def shifted(module: nn.Module, args: Any) -> Any:
        return args[0] * 1.3 + 0.2 if returns == "one tensor" else (args[0] * 1.3 + 0.2, *args[1:])

    for one in (model, theirs):
        for layer in one.model.layers:
            if returns == "a new forward":
                written = layer.mlp.forward
                layer.mlp.forward = lambda hidden, written=written: written(hidden * 1.3 + 0.2)
            else:
                layer.mlp.register_forward_pre_hook(shifted)
    actual, expected = model(tokens()), theirs(tokens(), output_router_logits=True)
    assert relative_error(actual.logits, expected.logits) < 2e-5
    assert relative_error(actual.logits, tiny("router loss")(tokens()).logits) > 1e-2
    for own, their in zip(actual.router_logits, expected.router_logits, strict=True):
        assert relative_error(own, their) < 2e-5
    assert relative_error(cached_logits(model, model.new_cache(2)), actual.logits) < 2e-5
    output = model(tokens(), routing=forced, output_routing=True)
    assert torch.equal(output.routing.indices, forced.indices)
    assert relative_error(output.logits, actual.logits) > 1e-3


class Wrapped(nn.Module):
    """A feed-forward around the model's own, with a factor."""

    def __init__(self, inner: nn.Module | None, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, hidden: Tensor) -> Tensor:
        return self.factor * (hidden if self.inner is None else self.inner(hidden))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_router_inside_a_wrapper_is_forced_and_returned(checkpointing: bool) -> None:
    plain, model = tiny("router loss"), tiny("router loss")
    with torch.no_grad():
        forced = plain(tokens(seed=4), output_routing=True).routing
    for layer in model.model.layers:
        layer.mlp = Wrapped(layer.mlp, 1.0)
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    for options in ({}, {"routing": forced}):
        own, expected = (one(tokens(), labels=tokens(), output_routing=True, **options) for one in (model, plain))
        assert relative_error(own.loss, expected.loss) < 1e-6
        assert relative_error(own.aux_loss, expected.aux_loss) < 1e-6
        assert torch.equal(own.routing.indices, expected.routing.indices)
        own.loss.backward()
        expected.loss.backward()
    wanted = plain.model.layers[0].mlp.gate.weight.grad
    assert relative_error(model.model.layers[0].mlp.inner.gate.weight.grad, wanted) < 2e-5
    model.model.layers[0].mlp = Wrapped(None, 0.5)
    with pytest.raises(ValueError, match="routing= has no effect on Wrapped"):
        model(tokens(), routing=forced)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_with_other_weights(kind: str) -> None:
    """Also gradients with torch.func, against backward."""
    model, other = tiny(kind, torch.float64), tiny(kind, torch.float64, seed=2)
    weights = dict(other.named_parameters())
    actual = torch.func.functional_call(model, weights, (tokens(),), {"labels": tokens()})
    assert relative_error(actual.logits, other(tokens()).logits) < 1e-12
    names = ["model.norm.weight", "model.layers.0.linear_attn.in_proj_z.weight", "model.layers.1.self_attn.q_proj.weight"]
    other(tokens(), labels=tokens()).loss.backward()

    def loss(chosen: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights | chosen, (tokens(),), {"labels": tokens()}).loss

    gradients = torch.func.grad(loss)({name: weights[name].detach() for name in names})
    for name in names:
        assert relative_error(gradients[name], weights[name].grad) < 1e-9, name


@pytest.mark.skipif(importlib.util.find_spec("nnsight") is None, reason="nnsight is not installed")
def test_nnsight_saves_and_replaces_values() -> None:
    assert memory.forked(traced_values)


def traced_values() -> bool:
    """In a child process: importing nnsight gives every object of its process a method `save`."""
    import nnsight

    model = tiny()
    traced = nnsight.NNsight(model)
    expected = seen_by_hooks(model)
    with torch.no_grad(), traced.trace(tokens()):
        mlp = traced.model.layers[0].mlp.output.save()
        norm = traced.model.norm.output.save()
        logits = traced.lm_head.output.save()
    assert torch.equal(mlp, expected["model.layers.0.mlp"])
    assert torch.equal(norm, expected["model.norm"]) and torch.equal(logits, expected["lm_head"])
    with torch.no_grad(), traced.trace(tokens()):
        traced.model.layers[0].mlp.output[:] = 0
        without = traced.lm_head.output.save()
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    assert relative_error(without, model(tokens()).logits) < 1e-6
    assert relative_error(without, expected["lm_head"]) > 1e-3
    return True
