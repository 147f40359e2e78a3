"""nnsight, plain hooks and torch.func.functional_call: values inside the model are seen and replaced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.integrations.common import KINDS, tiny, tokens
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
        whole, cache = model(tokens()).logits, model.new_cache(2)
        parts = [model(tokens()[:, :4], cache=cache).logits]
        parts += [model(tokens()[:, t : t + 1], cache=cache).logits for t in range(4, 9)]
        handle.remove()
        assert relative_error(whole, plain) > 1e-3, name
        assert relative_error(torch.cat(parts, 1), whole) < 2e-5, name
        assert torch.equal(model(tokens()).logits, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_with_other_weights(kind: str) -> None:
    """Also gradients with torch.func, against backward."""
    model, other = tiny(kind, torch.float64), tiny(kind, torch.float64, seed=2)
    weights = dict(other.named_parameters())
    found = torch.func.functional_call(model, weights, (tokens(),), {"labels": tokens()})
    assert relative_error(found.logits, other(tokens()).logits) < 1e-12
    names = ["model.norm.weight", "model.layers.0.linear_attn.in_proj_z.weight", "model.layers.1.self_attn.q_proj.weight"]
    other(tokens(), labels=tokens()).loss.backward()

    def loss(chosen: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights | chosen, (tokens(),), {"labels": tokens()}).loss

    gradients = torch.func.grad(loss)({name: weights[name].detach() for name in names})
    for name in names:
        assert relative_error(gradients[name], weights[name].grad) < 1e-9, name


def test_nnsight_saves_and_replaces_values() -> None:
    nnsight = pytest.importorskip("nnsight")
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
