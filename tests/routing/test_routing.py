"""`routing=` of a forward: recorded, forced, returned by a function; accepted forms and errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe import taps
from qwen35moe.ops.balancing import load_balancing_loss
from qwen35moe.routing import Routing, ablate, bias, force
from tests.support import peer
from tests.support.peer import FULL, LINEAR, assert_close, odd_shape

LAYERS, E, TOP_K = 4, 7, 3
CASE = odd_shape(
    11, layer_types=[LINEAR, FULL, LINEAR, LINEAR], num_hidden_layers=LAYERS, num_experts=E, num_experts_per_tok=TOP_K,
    router_aux_loss_coef=0.3, tie_word_embeddings=False,
)
B, T = 2, 9
IDS = CASE.ids(B, T)
LEFT = torch.tensor([[0] * 4 + [1] * 5, [1] * T])
RIGHT = LEFT.flip(1)
HOLES = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1, 0], [1] * T])
RESTARTS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 0, 1, 2, 3, 4, 0, 1, 2]])
BATCHES: dict[str, dict[str, Tensor]] = {
    "plain": {},
    "left-padded": {"attention_mask": LEFT},
    "right-padded": {"attention_mask": RIGHT},
    "padded in between": {"attention_mask": HOLES},
    "restarting positions": {"position_ids": RESTARTS},
    "restarting positions, padded": {"position_ids": RESTARTS, "attention_mask": LEFT},
    "packed": {"input_ids": IDS.view(1, -1), "cu_seqlens": torch.tensor([0, 4, 5, B * T])},
}


@pytest.fixture(scope="module")
def model() -> Any:
    model = peer.ours(CASE)
    peer.draw(model, 1)
    return model


def inputs(batch: str = "plain") -> dict[str, Tensor]:
    return {"input_ids": IDS} | BATCHES[batch]


@torch.no_grad()
def recorded(model: Any, **options: Any) -> Any:
    return model(**({"input_ids": IDS} | options), output_routing=True)


def rotated(routing: Routing) -> Routing:
    """The routing with every index one expert further, so that it differs from the router's."""
    return replace(routing, indices=(routing.indices + 1) % E, weights=None, logits=None)


def gradients_of(model: Any, **options: Any) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(IDS, labels=IDS, output_router_logits=True, **options).loss.backward()
    return peer.gradients(model)


# ---------------------------------------------------------------------------------------------------- record and replay


@pytest.mark.parametrize("batch", BATCHES)
def test_a_replay_is_the_recorded_forward_bit_for_bit(model, batch):
    """With weights, without, and in the order of serving engines; the replay's own routing is in the caller's order."""
    first = recorded(model, **inputs(batch))
    routing = first.routing
    shape = inputs(batch)["input_ids"].shape
    assert routing.indices.shape == (LAYERS, B * T, TOP_K) and routing.weights.shape == (LAYERS, B * T, TOP_K)
    assert routing.logits.shape == (LAYERS, B * T, E)
    assert (routing.layers, routing.num_experts, routing.shape) == (tuple(range(LAYERS)), E, tuple(shape))
    mask = inputs(batch).get("attention_mask")
    present = torch.ones(B * T, dtype=torch.bool) if mask is None else mask.flatten().bool()
    assert (routing.mask is None) == (mask is None) or bool(routing.mask.all())
    if mask is not None:
        assert torch.equal(routing.mask, present)
    for forced in (routing, routing.indices_only(), routing.to_batch()):
        again = recorded(model, **inputs(batch), routing=forced)
        assert torch.equal(again.logits, first.logits)
        assert torch.equal(again.routing.indices[:, present], routing.indices[:, present])
        assert torch.equal(again.routing.weights[:, present], routing.weights[:, present])


@pytest.mark.parametrize("batch", ["plain", "restarting positions, padded", "packed"])
def test_a_routing_of_other_experts_is_followed_token_by_token(model, batch):
    """Rotated indices reach their own tokens, whatever the layers' order of tokens."""
    routing = rotated(recorded(model, **inputs(batch)).routing)
    out = recorded(model, **inputs(batch), routing=routing)
    mask = inputs(batch).get("attention_mask")
    present = torch.ones(B * T, dtype=torch.bool) if mask is None else mask.flatten().bool()
    assert torch.equal(out.routing.indices[:, present], routing.indices[:, present])
    chosen = out.routing.logits.softmax(-1).gather(-1, routing.indices)
    assert_close(out.routing.weights[:, present], (chosen / chosen.sum(-1, keepdim=True))[:, present], 1e-6)
    assert not torch.allclose(out.logits, recorded(model, **inputs(batch)).logits, atol=1e-2)


def test_a_rollout_replayed_in_one_forward(model):
    """Recorded token by token with a cache, concatenated, replayed in one forward: the same choices, logits within the bound.
    And the other way: parts of one routing, replayed with a cache."""
    cache = model.new_cache(B)
    steps = [recorded(model, input_ids=part, cache=cache) for part in IDS.split([5, 1, 1, 2], dim=1)]
    batches = torch.cat([step.routing.to_batch() for step in steps], dim=1)
    whole = recorded(model, routing=batches)
    assert torch.equal(whole.routing.to_batch(), batches)
    assert_close(whole.logits, torch.cat([step.logits for step in steps], dim=1), 1e-5)
    cache = model.new_cache(B)
    other = rotated(recorded(model).routing)
    parts = [recorded(model, input_ids=part, cache=cache, routing=chosen).logits
              for part, chosen in zip(IDS.split([5, 4], 1), other.to_batch().split([5, 4], 1), strict=True)]
    assert_close(torch.cat(parts, 1), recorded(model, routing=other).logits, 1e-5)


# ---------------------------------------------------------------------------------------------------- weights


def test_indices_without_weights_pass_gradients_to_the_router(model):
    routing = rotated(recorded(model).routing)
    model.zero_grad(set_to_none=True)
    model(IDS, routing=routing).logits.square().sum().backward()
    for layer in model.model.layers:
        assert layer.mlp.gate.weight.grad.abs().max() > 0


def test_forced_weights_are_used_unchanged(model):
    """They are not normalised again, and the router gets no gradient but that of the balancing loss."""
    routing = recorded(model).routing
    doubled = replace(routing, weights=2 * routing.weights)
    with torch.no_grad():
        out = model(IDS, routing=doubled)
        with taps.patch(model, {"layers.*.mlp.routed": lambda routed: 2 * routed}):
            expected = model(IDS, routing=routing)
        assert_close(out.logits, expected.logits, 1e-6)
        zero = model(IDS, routing=replace(routing, weights=torch.zeros_like(routing.weights)))
        with taps.patch(model, {"layers.*.mlp.routed": torch.zeros_like}):
            assert torch.equal(zero.logits, model(IDS).logits)
    model.zero_grad(set_to_none=True)
    model(IDS, routing=doubled).logits.square().sum().backward()
    assert all(layer.mlp.gate.weight.grad is None or not layer.mlp.gate.weight.grad.any() for layer in model.model.layers)


def test_forced_weights_have_a_gradient(model):
    """A caller may learn them."""
    routing = recorded(model).routing
    weights = routing.weights.clone().requires_grad_()
    model(IDS, routing=replace(routing, weights=weights)).logits.square().sum().backward()
    assert weights.grad is not None and (weights.grad.abs().amax((1, 2)) > 0).all()


@pytest.mark.parametrize("batch", ["plain", "left-padded"])
@pytest.mark.parametrize("k", [1, 2, 5, E])
def test_another_k_than_the_router_s(model, k, batch):
    """The weights are those of the forced experts and sum to one, with padding or without."""
    indices = torch.arange(k).expand(LAYERS, B * T, k)
    out = recorded(model, **inputs(batch), routing=Routing(indices))
    assert out.routing.indices.shape == indices.shape
    real = recorded(model, **inputs(batch)).routing.mask
    real = torch.ones(B * T, dtype=torch.bool) if real is None else real
    assert_close(out.routing.weights.sum(-1)[:, real], torch.ones(LAYERS, int(real.sum())), 1e-6)
    by_function = recorded(model, **inputs(batch), routing=lambda layer, logits: indices[0, : logits.shape[0]])
    assert torch.equal(by_function.logits, out.logits)


def test_the_balancing_loss_counts_the_indices_that_were_used(model):
    routing = rotated(recorded(model).routing)
    with torch.no_grad():
        out = model(IDS, routing=routing, output_router_logits=True)
    expected = load_balancing_loss(list(out.router_logits), list(routing.indices))
    assert_close(out.aux_loss, expected, 1e-6)
    assert abs(out.aux_loss - recorded(model, output_router_logits=True).aux_loss) > 1e-3


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16], ids=str)
def test_indices_of_any_integer_dtype(model, dtype):
    """Serving engines send short integers."""
    routing = recorded(model).routing
    short = replace(routing.indices_only(), indices=routing.indices.to(dtype))
    expected = recorded(model, routing=routing.indices_only()).logits
    assert torch.equal(recorded(model, routing=short).logits, expected)
    assert torch.equal(recorded(model, routing=lambda layer, _: short.indices[layer]).logits, expected)


# ---------------------------------------------------------------------------------------------------- unforced rows


@pytest.mark.parametrize("batch", ["plain", "left-padded"])
@pytest.mark.parametrize("with_weights", [False, True], ids=["indices", "indices and weights"])
def test_rows_of_minus_one_are_unforced(model, with_weights, batch):
    """The router chooses for these tokens at its live logits; the others are forced."""
    first = recorded(model, **inputs(batch)).routing
    routing = rotated(first)
    unforced = torch.arange(B * T) % 3 == 0
    routing.indices[:, unforced] = -1
    if with_weights:
        routing = replace(routing, weights=torch.rand(LAYERS, B * T, TOP_K))
    out = recorded(model, **inputs(batch), routing=routing).routing
    real = torch.ones(B * T, dtype=torch.bool) if first.mask is None else first.mask
    assert torch.equal(out.indices[:, ~unforced & real], routing.indices[:, ~unforced & real])
    live = out.logits.softmax(-1).topk(TOP_K, dim=-1)
    weights = live.values / live.values.sum(-1, keepdim=True)
    assert torch.equal(out.indices[:, unforced & real], live.indices[:, unforced & real])
    assert_close(out.weights[:, unforced & real], weights[:, unforced & real], 1e-6)
    if routing.weights is not None:
        assert torch.equal(out.weights[:, ~unforced & real], routing.weights[:, ~unforced & real])


def test_an_unforced_routing_changes_nothing(model):
    unforced = Routing(torch.full((LAYERS, B * T, TOP_K), -1))
    assert torch.equal(recorded(model, routing=unforced).logits, recorded(model).logits)


def test_a_routing_of_some_layers_leaves_the_others_unforced(model):
    whole = rotated(recorded(model).routing)
    some = replace(whole, indices=whole.indices[[2, 1]], layers=(2, 1))
    out = recorded(model, routing=some).routing
    assert torch.equal(out.indices[[2, 1]], some.indices)
    for layer in (0, 3):
        assert torch.equal(out.indices[layer], out.logits[layer].softmax(-1).topk(TOP_K, dim=-1).indices)


# ---------------------------------------------------------------------------------------------------- a function


@pytest.mark.parametrize("with_weights", [False, True], ids=["indices", "indices and weights"])
def test_a_function_returns_the_routing(model, with_weights):
    """It is called once per layer, in order, with that layer's live logits [N, E]."""
    forced = recorded(model, routing=rotated(recorded(model).routing)).routing
    calls: list[tuple[int, Tensor]] = []

    def intervention(layer: int, logits: Tensor) -> Any:
        calls.append((layer, logits))
        return (forced.indices[layer], forced.weights[layer]) if with_weights else forced.indices[layer]

    out = recorded(model, routing=intervention)
    assert [layer for layer, _ in calls] == list(range(LAYERS))
    for layer, logits in calls:
        assert torch.equal(logits, out.routing.logits[layer])
    assert torch.equal(out.logits, recorded(model, routing=forced if with_weights else forced.indices_only()).logits)


def test_a_function_passes_gradients(model):
    """The router's rule as a function gives the router's gradients."""

    def router_rule(_layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        chosen = logits.softmax(-1).topk(TOP_K, dim=-1)
        return chosen.indices, chosen.values / chosen.values.sum(-1, keepdim=True)

    expected = gradients_of(model)
    peer.assert_all_close(gradients_of(model, routing=router_rule), expected, 1e-6)


def test_gradient_checkpointing_repeats_no_choice(model):
    """Equal gradients for every form of routing; a function is called once per layer, not again in the backward."""
    indices_only = rotated(recorded(model).routing)
    weighted = recorded(model, routing=indices_only).routing
    calls: list[int] = []

    def intervention(layer: int, logits: Tensor) -> Tensor:
        calls.append(layer)
        return indices_only.indices[layer]

    for routing in (indices_only, weighted, intervention):
        expected = gradients_of(model, routing=routing)
        calls.clear()
        model.train()
        model.gradient_checkpointing_enable()
        try:
            recomputed = gradients_of(model, routing=routing)
        finally:
            model.gradient_checkpointing_disable()
            model.eval()
        assert all(torch.equal(recomputed[name], gradient) for name, gradient in expected.items())
    assert calls == list(range(LAYERS))


# ---------------------------------------------------------------------------------------------------- as a tensor


def test_to_batch_and_back(model):
    routing = recorded(model, attention_mask=LEFT).routing
    batch = routing.to_batch()
    assert batch.shape == (B, T, LAYERS, TOP_K)
    assert torch.equal(batch[1, 6, 2], routing.indices[2, T + 6])
    with pytest.raises(ValueError, match="shape"):
        Routing(routing.indices).to_batch()


# ---------------------------------------------------------------------------------------------------- errors

N = B * T


@pytest.mark.parametrize("arguments,words", [
    ({"indices": torch.zeros(N, TOP_K, dtype=torch.long)}, [f"[{N}, {TOP_K}]"]),
    ({"indices": torch.zeros(LAYERS, N, TOP_K)}, ["torch.float32", "integers"]),
    ({"indices": torch.zeros(LAYERS, N, TOP_K, dtype=torch.bool)}, ["torch.bool", "integers"]),
    ({"indices": torch.zeros(LAYERS, N, TOP_K, dtype=torch.long), "weights": torch.zeros(LAYERS, N, TOP_K + 1)},
     [f"[{LAYERS}, {N}, {TOP_K}]", f"[{LAYERS}, {N}, {TOP_K + 1}]"]),
    ({"indices": torch.zeros(LAYERS, N, TOP_K, dtype=torch.long), "layers": (0, 1)}, ["2 layer", f"{LAYERS} layers"]),
    ({"indices": torch.zeros(2, N, TOP_K, dtype=torch.long), "layers": (1, 1)}, ["(1, 1)", "twice"]),
])
def test_a_routing_whose_parts_do_not_fit(arguments, words):
    with pytest.raises(ValueError) as error:
        Routing(**arguments)
    assert all(word in str(error.value) for word in words), error.value


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


WRONG: dict[str, tuple[Any, list[str]]] = {
    "token count": (Routing(zeros(LAYERS, N - 1, TOP_K)), [str(N - 1), str(N)]),
    "layer number": (Routing(zeros(2, N, TOP_K), layers=(1, 4)), ["layer 4", "4 layers"]),
    "negative layer": (Routing(zeros(2, N, TOP_K), layers=(-1, 0)), ["layer -1", "4 layers"]),
    "more layers": (Routing(zeros(5, N, TOP_K)), ["layer 4", "4 layers"]),
    "expert too high": (Routing(zeros(LAYERS, N, TOP_K) + E), [f"expert {E}", f"0 ... {E - 1}"]),
    "expert below -1": (Routing(zeros(LAYERS, N, TOP_K) - 2), ["expert -2", f"0 ... {E - 1}"]),
    "unforced, another k": (Routing(zeros(LAYERS, N, 2) - 1), [f"top_k={TOP_K}", "have 2"]),
    "a 3-D tensor": (zeros(LAYERS, N, TOP_K), [f"[{LAYERS}, {N}, {TOP_K}]", "[B, T, L, k]"]),
    "other batch": (zeros(B, T - 1, LAYERS, TOP_K), [f"[{B}, {T - 1}]", f"[{B}, {T}]"]),
    "transposed batch": (zeros(T, B, LAYERS, TOP_K), [f"[{T}, {B}]", f"[{B}, {T}]"]),
    "no routing": ("greedy", ["str"]),
    "function, tokens": (lambda _layer, _logits: zeros(N - 1, TOP_K), ["layer 0", f"[{N - 1}, {TOP_K}]", f"[{N}, "]),
    "function, 1-D": (lambda _layer, _logits: zeros(N), ["layer 0", f"[{N}]", f"[{N}, "]),
    "function, float": (lambda _layer, _logits: torch.zeros(N, TOP_K), ["layer 0", "torch.float32"]),
    "function, nothing": (lambda _layer, _logits: None, ["layer 0", "NoneType"]),
    "function, three": (lambda _layer, _logits: (zeros(N, TOP_K),) * 3, ["layer 0", "'Tensor', 'Tensor', 'Tensor'"]),
    "function, expert": (lambda _layer, _logits: zeros(N, TOP_K) + E, ["layer 0", f"expert {E}", f"0 ... {E - 1}"]),
    "function, unforced": (lambda _layer, _logits: zeros(N, TOP_K) - 1, ["layer 0", "expert -1", f"0 ... {E - 1}"]),
    "function, weights": (lambda _layer, _logits: (zeros(N, TOP_K), torch.zeros(N, TOP_K - 1)),
                          ["layer 0", f"[{N}, {TOP_K}]", f"[{N}, {TOP_K - 1}]"]),
    "function, late": (lambda layer, _logits: torch.arange(TOP_K) + zeros(N, 1) + E * (layer == 3), ["layer 3", "expert"]),
    "function, no expert": (lambda _layer, _logits: zeros(N, 0), ["layer 0", "no expert", f"[{N}, 0]"]),
    "function, twice": (lambda _layer, _logits: torch.tensor([2, 1, 2]).expand(N, 3), ["layer 0", "[2, 1, 2]", "twice"]),
    "function, NaN": (lambda _layer, _logits: (torch.arange(TOP_K).expand(N, -1), torch.full((N, TOP_K), torch.nan)),
                      ["layer 0", "weights that are not finite"]),
    "function, whole weights": (lambda _layer, _logits: (torch.arange(TOP_K).expand(N, -1), zeros(N, TOP_K)),
                                ["layer 0", "floating-point", "torch.int64"]),
    "an expert twice": (Routing(zeros(LAYERS, N, TOP_K) + 4), ["layer 0", "[4, 4, 4]", "twice"]),
    "expert 0 twice": (Routing(zeros(LAYERS, N, TOP_K)), ["layer 0", "[0, 0, 0]", "twice"]),
    "twice, another k": (zeros(B, T, LAYERS, 2) + 4, ["layer 0", "[4, 4]", "twice"]),
    "unforced in part": (Routing(torch.tensor([0, -1, 2]).expand(LAYERS, N, 3)), ["[0, -1, 2]", "in part"]),
    "NaN weights": (Routing(torch.arange(TOP_K).expand(LAYERS, N, TOP_K), torch.full((LAYERS, N, TOP_K), torch.nan)),
                    ["the routing", "not finite"]),
    "other experts": (Routing(torch.arange(TOP_K).expand(LAYERS, N, TOP_K), num_experts=9), ["of 9 experts", f"has {E}"]),
    "layer of an intervention": (ablate({LAYERS: [1]}), ["ablate() names layer 4", "[0, 1, 2, 3]"]),
    "expert of an intervention": (force({2: [E]}), ["force, layer 2", f"no expert {E}", f"0 ... {E - 1}"]),
    "layer of a bias": (bias({-1: torch.zeros(E)}), ["bias() names layer -1"]),
}


@pytest.mark.parametrize("routing,words", WRONG.values(), ids=WRONG)
def test_errors_name_both_values_and_leave_the_cache_unchanged(model, routing, words):
    with torch.no_grad():
        cache = model(CASE.ids(B, 3), cache=model.new_cache(B)).cache
        before = cache.clone()
        with pytest.raises(ValueError) as error:
            model(IDS, routing=routing, cache=cache)
        assert all(word in str(error.value) for word in words), error.value
        step = CASE.ids(B, 1, salt=1)
        assert torch.equal(model(step, cache=cache).logits, model(step, cache=before).logits)


def test_a_dense_model_has_no_routers():
    dense = peer.ours(odd_shape(100, dense=True))
    ids = torch.zeros(1, 2, dtype=torch.long)
    for options in ({"routing": Routing(zeros(1, 2, 1))}, {"output_routing": True}, {"output_router_logits": True}):
        with pytest.raises(ValueError, match="dense"):
            dense(ids, **options)
