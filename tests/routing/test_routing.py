"""Routing as data: captured, replayed, decided by a function; what may be given, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe import taps
from qwen35moe.ops.balancing import load_balancing_loss
from qwen35moe.routing import Routing
from tests.support import peer
from tests.support.peer import FULL, LINEAR, assert_close, odd_shape

LAYERS, E, S = 4, 7, 3
CASE = odd_shape(
    11, layer_types=[LINEAR, FULL, LINEAR, LINEAR], num_hidden_layers=LAYERS, num_experts=E, num_experts_per_tok=S,
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
def captured(model: Any, **options: Any) -> Any:
    return model(**({"input_ids": IDS} | options), output_routing=True)


def rotated(routing: Routing) -> Routing:
    """The same with every choice one expert further: a routing that no router would choose."""
    return replace(routing, indices=(routing.indices + 1) % E, weights=None, logits=None)


def gradients_of(model: Any, **options: Any) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    model(IDS, labels=IDS, output_router_logits=True, **options).loss.backward()
    return peer.gradients(model)


# ---------------------------------------------------------------------------------------------------- capture and replay


@pytest.mark.parametrize("batch", BATCHES)
def test_a_replay_is_the_captured_run_bit_for_bit(model, batch):
    """With weights, without, and in the order of serving engines; the replay says what it did, in the caller's order."""
    first = captured(model, **inputs(batch))
    routing = first.routing
    shape = inputs(batch)["input_ids"].shape
    assert routing.indices.shape == (LAYERS, B * T, S) and routing.weights.shape == (LAYERS, B * T, S)
    assert routing.logits.shape == (LAYERS, B * T, E)
    assert (routing.layers, routing.num_experts, routing.shape) == (tuple(range(LAYERS)), E, tuple(shape))
    mask = inputs(batch).get("attention_mask")
    present = torch.ones(B * T, dtype=torch.bool) if mask is None else mask.flatten().bool()
    assert (routing.mask is None) == (mask is None) or bool(routing.mask.all())
    if mask is not None:
        assert torch.equal(routing.mask, present)
    for given in (routing, routing.indices_only(), routing.to_batch()):
        again = captured(model, **inputs(batch), routing=given)
        assert torch.equal(again.logits, first.logits)
        assert torch.equal(again.routing.indices[:, present], routing.indices[:, present])
        assert torch.equal(again.routing.weights[:, present], routing.weights[:, present])


@pytest.mark.parametrize("batch", ["plain", "restarting positions, padded", "packed"])
def test_a_routing_of_other_experts_is_followed_token_by_token(model, batch):
    """Rotated indices reach exactly the tokens they are given for, whatever the layers' own order of tokens."""
    routing = rotated(captured(model, **inputs(batch)).routing)
    out = captured(model, **inputs(batch), routing=routing)
    mask = inputs(batch).get("attention_mask")
    present = torch.ones(B * T, dtype=torch.bool) if mask is None else mask.flatten().bool()
    assert torch.equal(out.routing.indices[:, present], routing.indices[:, present])
    chosen = out.routing.logits.softmax(-1).gather(-1, routing.indices)
    assert_close(out.routing.weights[:, present], (chosen / chosen.sum(-1, keepdim=True))[:, present], 1e-6)
    assert not torch.allclose(out.logits, captured(model, **inputs(batch)).logits, atol=1e-2)


def test_a_rollout_replayed_in_one_forward(model):
    """Captured token by token from a cache, put together, replayed over the whole: the same choices, logits within the
    bound. And the other way: pieces of the whole, replayed with a cache."""
    cache = model.new_cache(B)
    steps = [captured(model, input_ids=part, cache=cache) for part in IDS.split([5, 1, 1, 2], dim=1)]
    batches = torch.cat([step.routing.to_batch() for step in steps], dim=1)
    whole = captured(model, routing=batches)
    assert torch.equal(whole.routing.to_batch(), batches)
    assert_close(whole.logits, torch.cat([step.logits for step in steps], dim=1), 1e-5)
    cache = model.new_cache(B)
    other = rotated(captured(model).routing)
    pieces = [captured(model, input_ids=part, cache=cache, routing=chosen).logits
              for part, chosen in zip(IDS.split([5, 4], 1), other.to_batch().split([5, 4], 1), strict=True)]
    assert_close(torch.cat(pieces, 1), captured(model, routing=other).logits, 1e-5)


# ---------------------------------------------------------------------------------------------------- weights


def test_indices_alone_take_live_weights_and_the_gradient_reaches_the_router(model):
    routing = rotated(captured(model).routing)
    model.zero_grad(set_to_none=True)
    model(IDS, routing=routing).logits.square().sum().backward()
    for layer in model.model.layers:
        assert layer.mlp.gate.weight.grad.abs().max() > 0


def test_given_weights_are_used_as_they_are(model):
    """Not normalised again; and no gradient reaches a router whose choice and weights are given, only the balancing loss."""
    routing = captured(model).routing
    doubled = replace(routing, weights=2 * routing.weights)
    with torch.no_grad():
        found = model(IDS, routing=doubled)
        with taps.patch(model, {"layers.*.mlp.routed": lambda routed: 2 * routed}):
            expected = model(IDS, routing=routing)
        assert_close(found.logits, expected.logits, 1e-6)
        nothing = model(IDS, routing=replace(routing, weights=torch.zeros_like(routing.weights)))
        with taps.patch(model, {"layers.*.mlp.routed": torch.zeros_like}):
            assert torch.equal(nothing.logits, model(IDS).logits)
    model.zero_grad(set_to_none=True)
    model(IDS, routing=doubled).logits.square().sum().backward()
    assert all(layer.mlp.gate.weight.grad is None or not layer.mlp.gate.weight.grad.any() for layer in model.model.layers)


def test_the_gradient_of_given_weights(model):
    """They are an input like others: a caller may learn them."""
    routing = captured(model).routing
    weights = routing.weights.clone().requires_grad_()
    model(IDS, routing=replace(routing, weights=weights)).logits.square().sum().backward()
    assert weights.grad is not None and (weights.grad.abs().amax((1, 2)) > 0).all()


@pytest.mark.parametrize("batch", ["plain", "left-padded"])
@pytest.mark.parametrize("slots", [1, 2, 5, E])
def test_another_number_of_experts_than_top_k(model, slots, batch):
    """More experts or fewer per token, padding or none: the weights are those of the chosen, and sum to one."""
    indices = torch.arange(slots).expand(LAYERS, B * T, slots)
    out = captured(model, **inputs(batch), routing=Routing(indices))
    assert out.routing.indices.shape == indices.shape
    real = captured(model, **inputs(batch)).routing.mask
    real = torch.ones(B * T, dtype=torch.bool) if real is None else real
    assert_close(out.routing.weights.sum(-1)[:, real], torch.ones(LAYERS, int(real.sum())), 1e-6)
    by_function = captured(model, **inputs(batch), routing=lambda layer, logits: indices[0, : logits.shape[0]])
    assert torch.equal(by_function.logits, out.logits)


def test_the_balancing_loss_counts_the_indices_that_were_used(model):
    routing = rotated(captured(model).routing)
    with torch.no_grad():
        out = model(IDS, routing=routing, output_router_logits=True)
    expected = load_balancing_loss(list(out.router_logits), list(routing.indices))
    assert_close(out.aux_loss, expected, 1e-6)
    assert abs(out.aux_loss - captured(model, output_router_logits=True).aux_loss) > 1e-3


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16], ids=str)
def test_indices_of_any_integer_dtype(model, dtype):
    """Serving engines send short ones."""
    routing = captured(model).routing
    short = replace(routing.indices_only(), indices=routing.indices.to(dtype))
    expected = captured(model, routing=routing.indices_only()).logits
    assert torch.equal(captured(model, routing=short).logits, expected)
    assert torch.equal(captured(model, routing=lambda layer, _: short.indices[layer]).logits, expected)


# ---------------------------------------------------------------------------------------------------- free choices


@pytest.mark.parametrize("batch", ["plain", "left-padded"])
@pytest.mark.parametrize("with_weights", [False, True], ids=["indices", "indices and weights"])
def test_rows_of_minus_one_are_free(model, with_weights, batch):
    """The router decides those tokens, at its live logits; the others stay as given."""
    first = captured(model, **inputs(batch)).routing
    given = rotated(first)
    free = torch.arange(B * T) % 3 == 0
    given.indices[:, free] = -1
    if with_weights:
        given = replace(given, weights=torch.rand(LAYERS, B * T, S))
    out = captured(model, **inputs(batch), routing=given).routing
    real = torch.ones(B * T, dtype=torch.bool) if first.mask is None else first.mask
    assert torch.equal(out.indices[:, ~free & real], given.indices[:, ~free & real])
    live = out.logits.softmax(-1).topk(S, dim=-1)
    weights = live.values / live.values.sum(-1, keepdim=True)
    assert torch.equal(out.indices[:, free & real], live.indices[:, free & real])
    assert_close(out.weights[:, free & real], weights[:, free & real], 1e-6)
    if given.weights is not None:
        assert torch.equal(out.weights[:, ~free & real], given.weights[:, ~free & real])


def test_all_free_is_the_model_itself(model):
    free = Routing(torch.full((LAYERS, B * T, S), -1))
    assert torch.equal(captured(model, routing=free).logits, captured(model).logits)


def test_a_routing_of_some_layers_leaves_the_others_free(model):
    given = rotated(captured(model).routing)
    some = replace(given, indices=given.indices[[2, 1]], layers=(2, 1))
    out = captured(model, routing=some).routing
    assert torch.equal(out.indices[[2, 1]], some.indices)
    for layer in (0, 3):
        assert torch.equal(out.indices[layer], out.logits[layer].softmax(-1).topk(S, dim=-1).indices)


# ---------------------------------------------------------------------------------------------------- a function


@pytest.mark.parametrize("with_weights", [False, True], ids=["indices", "indices and weights"])
def test_a_function_decides(model, with_weights):
    """Called once per layer, in order, with that layer's live logits [N, E]."""
    given = captured(model, routing=rotated(captured(model).routing)).routing
    seen: list[tuple[int, Tensor]] = []

    def decide(layer: int, logits: Tensor) -> Any:
        seen.append((layer, logits))
        return (given.indices[layer], given.weights[layer]) if with_weights else given.indices[layer]

    out = captured(model, routing=decide)
    assert [layer for layer, _ in seen] == list(range(LAYERS))
    for layer, logits in seen:
        assert torch.equal(logits, out.routing.logits[layer])
    assert torch.equal(out.logits, captured(model, routing=given if with_weights else given.indices_only()).logits)


def test_a_function_may_bias_the_logits_and_pass_gradients(model):
    """The router's own rule, written outside: the same gradients as the router's."""

    def own_rule(_layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        chosen = logits.softmax(-1).topk(S, dim=-1)
        return chosen.indices, chosen.values / chosen.values.sum(-1, keepdim=True)

    expected = gradients_of(model)
    peer.assert_all_close(gradients_of(model, routing=own_rule), expected, 1e-6)


def test_gradient_checkpointing_repeats_no_choice(model):
    """Equal gradients for every form of routing; a function is asked once per layer, not again for the backward."""
    given = rotated(captured(model).routing)
    weighted = captured(model, routing=given).routing
    asked: list[int] = []

    def decide(layer: int, logits: Tensor) -> Tensor:
        asked.append(layer)
        return given.indices[layer]

    for routing in (given, weighted, decide):
        expected = gradients_of(model, routing=routing)
        asked.clear()
        model.train()
        model.gradient_checkpointing_enable()
        try:
            found = gradients_of(model, routing=routing)
        finally:
            model.gradient_checkpointing_disable()
            model.eval()
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert asked == list(range(LAYERS))


# ---------------------------------------------------------------------------------------------------- as a value


def test_to_batch_and_back(model):
    routing = captured(model, attention_mask=LEFT).routing
    batch = routing.to_batch()
    assert batch.shape == (B, T, LAYERS, S)
    assert torch.equal(batch[1, 6, 2], routing.indices[2, T + 6])
    with pytest.raises(ValueError, match="shape"):
        Routing(routing.indices).to_batch()


# ---------------------------------------------------------------------------------------------------- refused

N = B * T


@pytest.mark.parametrize("arguments,words", [
    ({"indices": torch.zeros(N, S, dtype=torch.long)}, [f"[{N}, {S}]"]),
    ({"indices": torch.zeros(LAYERS, N, S)}, ["torch.float32", "integers"]),
    ({"indices": torch.zeros(LAYERS, N, S, dtype=torch.bool)}, ["torch.bool", "integers"]),
    ({"indices": torch.zeros(LAYERS, N, S, dtype=torch.long), "weights": torch.zeros(LAYERS, N, S + 1)},
     [f"[{LAYERS}, {N}, {S}]", f"[{LAYERS}, {N}, {S + 1}]"]),
    ({"indices": torch.zeros(LAYERS, N, S, dtype=torch.long), "layers": (0, 1)}, ["2 layer", f"{LAYERS} layers"]),
    ({"indices": torch.zeros(2, N, S, dtype=torch.long), "layers": (1, 1)}, ["(1, 1)", "twice"]),
])
def test_a_routing_that_contradicts_itself(arguments, words):
    with pytest.raises(ValueError) as error:
        Routing(**arguments)
    assert all(word in str(error.value) for word in words), error.value


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


REFUSED: dict[str, tuple[Any, list[str]]] = {
    "token count": (Routing(zeros(LAYERS, N - 1, S)), [str(N - 1), str(N)]),
    "layer number": (Routing(zeros(2, N, S), layers=(1, 4)), ["layer 4", "4 layers"]),
    "negative layer": (Routing(zeros(2, N, S), layers=(-1, 0)), ["layer -1", "4 layers"]),
    "more layers": (Routing(zeros(5, N, S)), ["layer 4", "4 layers"]),
    "expert too high": (Routing(zeros(LAYERS, N, S) + E), [f"expert {E}", f"0 ... {E - 1}"]),
    "expert below free": (Routing(zeros(LAYERS, N, S) - 2), ["expert -2", f"0 ... {E - 1}"]),
    "free, other slots": (Routing(zeros(LAYERS, N, 2) - 1), [f"top_k={S}", "2 slots"]),
    "a 3-D tensor": (zeros(LAYERS, N, S), [f"[{LAYERS}, {N}, {S}]", "[B, T, L, S]"]),
    "other batch": (zeros(B, T - 1, LAYERS, S), [f"[{B}, {T - 1}]", f"[{B}, {T}]"]),
    "transposed batch": (zeros(T, B, LAYERS, S), [f"[{T}, {B}]", f"[{B}, {T}]"]),
    "no routing": ("greedy", ["str"]),
    "function, tokens": (lambda _layer, _logits: zeros(N - 1, S), ["layer 0", f"[{N - 1}, {S}]", f"[{N}, "]),
    "function, 1-D": (lambda _layer, _logits: zeros(N), ["layer 0", f"[{N}]", f"[{N}, "]),
    "function, float": (lambda _layer, _logits: torch.zeros(N, S), ["layer 0", "torch.float32"]),
    "function, nothing": (lambda _layer, _logits: None, ["layer 0", "NoneType"]),
    "function, three": (lambda _layer, _logits: (zeros(N, S),) * 3, ["layer 0", "'Tensor', 'Tensor', 'Tensor'"]),
    "function, expert": (lambda _layer, _logits: zeros(N, S) + E, ["layer 0", f"expert {E}", f"0 ... {E - 1}"]),
    "function, free": (lambda _layer, _logits: zeros(N, S) - 1, ["layer 0", "expert -1", f"0 ... {E - 1}"]),
    "function, weights": (lambda _layer, _logits: (zeros(N, S), torch.zeros(N, S - 1)),
                          ["layer 0", f"[{N}, {S}]", f"[{N}, {S - 1}]"]),
    "function, late": (lambda layer, _logits: zeros(N, S) + E * (layer == 3), ["layer 3", f"expert {E}"]),
}


@pytest.mark.parametrize("routing,words", REFUSED.values(), ids=REFUSED)
def test_refused(model, routing, words):
    """Both values are named, and the cache is as it was."""
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
