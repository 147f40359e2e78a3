"""Bad input of a forward: a ValueError that names the actual and the expected value, and an unchanged cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen35moe.models.text import Qwen3_5MoeForCausalLM
from tests.support import peer
from tests.support.peer import FULL, LINEAR, assert_close, odd_shape

CASE = odd_shape(
    13, layer_types=[LINEAR, FULL, LINEAR], num_hidden_layers=3, num_experts=5, num_experts_per_tok=2,
    tie_word_embeddings=False,
)
WORDS, D = CASE.text["vocab_size"], CASE.text["hidden_size"]
B, T, PAST = 2, 6, 4


@pytest.fixture(scope="module")
def model() -> Any:
    model = peer.ours(CASE)
    peer.draw(model, 3)
    return model


def ids(batch: int = B, length: int = T) -> Tensor:
    return CASE.ids(batch, length)


def with_id(value: int) -> Tensor:
    tokens = ids()
    tokens[1, 2] = value
    return tokens


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.long)


def bounds(*values: int) -> Tensor:
    return torch.tensor(values)


ROW = {"input_ids": ids(1)}  # packed documents lie in one row
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    # what goes in
    "nothing": ({"input_ids": None}, ["input_ids", "inputs_embeds", "neither"]),
    "ids and embeddings": ({"inputs_embeds": torch.zeros(B, T, D)}, ["input_ids", "inputs_embeds", "both"]),
    "ids, one dimension": ({"input_ids": ids()[0]}, [f"[{T}]", "[B, T]"]),
    "ids, three dimensions": ({"input_ids": ids()[None]}, [f"[1, {B}, {T}]", "[B, T]"]),
    "ids, float": ({"input_ids": ids().float()}, ["torch.float32", "integers"]),
    "ids, bool": ({"input_ids": ids() > 3}, ["torch.bool", "integers"]),
    "id too high": ({"input_ids": with_id(WORDS)}, [f"id {WORDS} ", f"0 ... {WORDS - 1}"]),
    "id negative": ({"input_ids": with_id(-100)}, ["id -100 ", f"0 ... {WORDS - 1}"]),
    "empty prompt": ({"input_ids": ids()[:, :0]}, [f"[{B}, 0]", "at least one"]),
    "empty batch": ({"input_ids": ids()[:0]}, [f"[0, {T}]", "at least one"]),
    "embeddings, width": ({"input_ids": None, "inputs_embeds": torch.zeros(B, T, D + 1)},
                          [f"[{B}, {T}, {D + 1}]", f"[B, T, {D}]"]),
    "embeddings, 2-D": ({"input_ids": None, "inputs_embeds": torch.zeros(B, D)}, [f"[{B}, {D}]", f"[B, T, {D}]"]),
    "embeddings, dtype": ({"input_ids": None, "inputs_embeds": torch.zeros(B, T, D).bfloat16()},
                          ["torch.bfloat16", "torch.float32"]),
    "embeddings, empty": ({"input_ids": None, "inputs_embeds": torch.zeros(B, 0, D)}, [f"[{B}, 0]", "at least one"]),
    # masks
    "mask, too short": ({"attention_mask": ones(B, T - 1)}, [f"[{B}, {T - 1}]", f"[{B}, {T}]"]),
    "mask, too long": ({"attention_mask": ones(B, T + 1)}, [f"[{B}, {T + 1}]", f"[{B}, {T}]"]),
    "mask, other rows": ({"attention_mask": ones(B + 1, T)}, [f"[{B + 1}, {T}]", f"[{B}, {T}]"]),
    "mask, 4-D": ({"attention_mask": ones(B, 1, T, T).bool()}, ["4", f"[{B}, 1, {T}, {T}]", "2-D", "cu_seqlens"]),
    "mask, 3-D": ({"attention_mask": ones(B, T, T)}, ["3", f"[{B}, {T}, {T}]", "2-D"]),
    "mask of other numbers": ({"attention_mask": ones(B, T) * 2}, ["2", "ones", "zeros"]),
    "mask, additive": ({"attention_mask": torch.zeros(B, T).masked_fill(ones(B, T).tril() == 0, -1e9)},
                       ["-1000000000", "ones", "zeros"]),
    "mask, nan": ({"attention_mask": torch.full((B, T), float("nan"))}, ["nan", "ones"]),
    # positions
    "a list of positions to keep": ({"logits_to_keep": [1, 2]}, ["logits_to_keep", "list"]),
    "a slice to keep": ({"logits_to_keep": slice(1)}, ["logits_to_keep", "slice"]),
    "labels, bool": ({"labels": ids() > 3}, ["labels", "torch.bool"]),
    "positions, too short": ({"position_ids": ones(B, T - 1)}, [f"[{B}, {T - 1}]", f"[{B}, {T}]"]),
    "positions, other rows": ({"position_ids": ones(B + 1, T)}, [f"[{B + 1}, {T}]", f"[{B}, {T}]"]),
    "positions, two axes": ({"position_ids": ones(2, B, T)}, [f"[2, {B}, {T}]", f"[3, {B}, {T}]"]),
    "positions, one dimension": ({"position_ids": ones(T)}, [f"[{T}]", f"[{B}, {T}]"]),
    "positions, float": ({"position_ids": torch.arange(T).float().expand(B, T)}, ["torch.float32", "integers"]),
    "positions, bool": ({"position_ids": torch.arange(T).bool().expand(B, T)}, ["torch.bool", "integers"]),
    # packed documents
    "bounds, several rows": ({"cu_seqlens": bounds(0, 3, T)}, ["[1, T]", f"{B} rows"]),
    "bounds, begin late": (ROW | {"cu_seqlens": bounds(1, 3, T)}, ["[1, 3, 6]", "from 0", f"{T}"]),
    "bounds, end early": (ROW | {"cu_seqlens": bounds(0, 3, T - 1)}, ["[0, 3, 5]", f"{T}"]),
    "bounds, end late": (ROW | {"cu_seqlens": bounds(0, 3, T + 1)}, ["[0, 3, 7]", f"{T}"]),
    "bounds, fall": (ROW | {"cu_seqlens": bounds(0, 4, 3, T)}, ["[0, 4, 3, 6]", "rise"]),
    "bounds, float": (ROW | {"cu_seqlens": bounds(0, 3, T).float()}, ["torch.float32", "integers"]),
    "bounds, 2-D": (ROW | {"cu_seqlens": bounds(0, 3, T)[None]}, ["[1, 3]", "vector"]),
    "bounds, one": (ROW | {"cu_seqlens": bounds(0)}, ["[1]", "vector"]),
    "bounds and padding": (ROW | {"cu_seqlens": bounds(0, 3, T), "attention_mask": bounds(0, 1, 1, 1, 1, 1)[None]},
                           ["cu_seqlens", "attention_mask"]),
    "bounds against positions": (ROW | {"cu_seqlens": bounds(0, 3, T), "position_ids": bounds(0, 1, 0, 1, 2, 3)[None]},
                                 ["token 2", "[0, 3, 6]"]),
    # labels and results
    "labels, shape": ({"labels": ids(B, T - 1)}, [f"[{B}, {T - 1}]", f"[{B}, {T}]"]),
    "labels, float": ({"labels": ids().float()}, ["torch.float32", "integers"]),
    "label too high": ({"labels": with_id(WORDS)}, [f"label {WORDS} ", f"0 ... {WORDS - 1}", "-100"]),
    "label negative": ({"labels": with_id(-1)}, ["label -1 ", f"0 ... {WORDS - 1}", "-100"]),
    "no logits, no labels": ({"output_logits": False}, ["output_logits=False", "labels"]),
    "logits to keep": ({"logits_to_keep": -1}, ["logits_to_keep=-1", ">= 0"]),
    "logits to keep, beyond": ({"logits_to_keep": bounds(0, T)}, [f"position {T}", f"has {T}"]),
    "logits to keep, float": ({"logits_to_keep": bounds(0).float()}, ["torch.float32", "integers"]),
    "a list": ({"input_ids": [[1, 2]]}, ["input_ids", "list"]),
    "a mask as a list": ({"attention_mask": [[1, 1]]}, ["attention_mask", "list"]),
    "labels as a list": ({"labels": [[1, 1]]}, ["labels", "list"]),
}


@pytest.mark.parametrize("arguments,words", REFUSED.values(), ids=REFUSED)
def test_refused(model, arguments, words):
    with torch.no_grad(), pytest.raises(ValueError) as error:
        model(**({"input_ids": ids()} | arguments))
    assert all(word in str(error.value) for word in words), error.value


# ---------------------------------------------------------------------------------------------------- with a cache


class Foreign:
    """Another library's cache."""


def other_layers(model: Any) -> Any:
    fewer = model.config.replace(num_hidden_layers=2)
    return Qwen3_5MoeForCausalLM(fewer).new_cache(B)


def cached(max_length: int | None = None, rows: int = B, mask: Tensor | None = None) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        return model(ids(rows, PAST), attention_mask=mask, cache=model.new_cache(rows, max_length)).cache

    return make


PADDED = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
CACHED: dict[str, tuple[Callable[[Any], Any], dict[str, Any], list[str]]] = {
    "prompt longer than a static cache": (lambda m: m.new_cache(B, T - 1), {}, [f"{T} tokens", f"room for {T - 1}"]),
    "continuation longer than a static cache": (cached(PAST + T - 1), {},
                                                [f"{PAST + T} tokens", f"room for {PAST + T - 1}"]),
    "one padded row too long": (
        cached(PAST + T - 1, mask=PADDED), {"attention_mask": torch.cat([PADDED, ones(B, T)], 1)},
        [f"{PAST + T} tokens", f"room for {PAST + T - 1}"]),
    "other rows": (cached(rows=3), {}, ["3 rows", f"{B}"]),
    "mask of the new tokens only": (cached(), {"attention_mask": ones(B, T)}, [f"[{B}, {T}]", f"[{B}, {PAST + T}]"]),
    "mask of another past": (cached(), {"attention_mask": torch.cat([PADDED, ones(B, T)], 1)}, ["[2, 4]", "[4, 4]"]),
    "positions of past and new": (cached(), {"position_ids": torch.arange(PAST + T).expand(B, -1)},
                                  [f"[{B}, {PAST + T}]", f"[{B}, {T}]"]),
    "id too high": (cached(), {"input_ids": with_id(WORDS)}, [f"id {WORDS} ", f"{WORDS - 1}"]),
    "label too high": (cached(), {"labels": with_id(WORDS)}, [f"label {WORDS} ", f"{WORDS - 1}"]),
    "logits to keep": (cached(), {"logits_to_keep": -1}, ["logits_to_keep=-1", ">= 0"]),
    "logits to keep, beyond": (cached(), {"logits_to_keep": bounds(0, T)}, [f"position {T}", f"has {T}"]),
    "documents and rows": (cached(), ROW | {"cu_seqlens": bounds(0, 1, 3, T)}, ["3 documents", f"{B} rows"]),
    "dense routing words": (cached(), {"routing": 3}, ["int"]),
    "other layers": (other_layers, {}, ["2 layers", "3"]),
    "other dtype": (lambda m: peer.ours(CASE, dtype=torch.bfloat16).new_cache(B), {}, ["torch.bfloat16", "torch.float32"]),
    "other library": (lambda m: Foreign(), {}, ["Foreign", "new_cache(2)"]),
    "a tuple": (lambda m: (), {}, ["tuple", "new_cache(2)"]),
}


def held(cache: Any) -> list[Any]:
    tensors = [getattr(layer, name) for layer in cache.layers for name in ("key", "value", "conv_state", "recurrent_state")
               if hasattr(layer, name)]
    return [tensor.clone() for tensor in (*tensors, cache.lengths)]


@pytest.mark.parametrize("make,arguments,words", CACHED.values(), ids=CACHED)
def test_refused_with_a_cache_which_stays_as_it_was(model, make, arguments, words):
    """The cache keeps its tensors and lengths."""
    with torch.no_grad():
        cache = make(model)
        ours = hasattr(cache, "layers")
        before, seen = (held(cache), cache.seen) if ours else ([], 0)
        with pytest.raises(ValueError) as error:
            model(**({"input_ids": ids(), "cache": cache} | arguments))
        assert all(word in str(error.value) for word in words), error.value
        if ours:
            assert cache.seen == seen
            assert all(torch.equal(a, b) for a, b in zip(held(cache), before, strict=True))


@pytest.mark.parametrize("arguments", [{"labels": with_id(WORDS)}, {"logits_to_keep": -1}, {"input_ids": with_id(-1)}],
                         ids=["label", "logits to keep", "id"])
def test_a_refused_call_does_not_change_the_next_step(model, arguments):
    with torch.no_grad():
        cache = cached()(model)
        other = cache.clone()
        with pytest.raises(ValueError):
            model(**({"input_ids": ids(), "cache": cache} | arguments))
        step = ids(B, 1)
        assert torch.equal(model(step, cache=cache).logits, model(step, cache=other).logits)


@pytest.mark.parametrize("argument", ["output_routing", "output_router_logits"])
def test_a_dense_model_has_no_router_outputs(argument):
    """Refused before the cache changes."""
    dense = peer.ours(odd_shape(100, dense=True))
    cache = dense.new_cache(1)
    with torch.no_grad(), pytest.raises(ValueError, match=f"{argument}.*dense"):
        dense(ones(1, 2), cache=cache, **{argument: True})
    assert cache.lengths.tolist() == [0] and cache.seen == 0


def test_a_static_cache_carries_no_gradient(model):
    cache = model.new_cache(B, T)
    with pytest.raises(ValueError, match="no_grad"):
        model(ids(), cache=cache)
    assert cache.lengths.tolist() == [0, 0]


@pytest.mark.parametrize("arguments,words", [
    ({"batch_size": 0}, ["batch_size=0"]), ({"batch_size": 1, "max_length": 0}, ["max_length=0"]),
    ({"batch_size": 1, "record": -1}, ["record=-1"]),
])
def test_caches_of_no_size(model, arguments, words):
    with pytest.raises(ValueError) as error:
        model.new_cache(**arguments)
    assert all(word in str(error.value) for word in words), error.value


# ---------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("with_cache", [False, True], ids=["no cache", "cache"])
@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_nan_in_padding_is_never_seen(model, side, with_cache):
    """Embeddings of nan at masked positions: logits, states, loss and gradients are those of zeros at these positions."""
    mask = {"left": [[0, 0, 1, 1, 1, 1], [1] * 6], "right": [[1, 1, 1, 1, 0, 0], [1] * 6],
            "between": [[1, 0, 0, 1, 1, 0], [1] * 6]}[side]
    attention_mask = torch.tensor(mask)
    real = attention_mask.bool()
    embeddings = model.get_input_embeddings()(ids()).detach()
    results = []
    for filling in (0.0, float("nan")):
        filled = embeddings.masked_fill(~real[..., None], filling).requires_grad_()
        cache = model.new_cache(B) if with_cache else None
        model.zero_grad(set_to_none=True)
        out = model(inputs_embeds=filled, attention_mask=attention_mask, labels=ids(), cache=cache, output_router_logits=True)
        out.loss.backward()
        states = [] if cache is None else held(cache)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([out.logits.detach(), out.loss.detach(), out.aux_loss.detach(), filled.grad, *states, *grads])
    for zero, nan in zip(*results, strict=True):
        assert torch.isfinite(nan).all() and torch.equal(zero, nan)
    assert not results[1][3][~real].any()


def test_a_row_of_padding_only(model):
    """No token at all in one row: the other row is as alone, and the empty one waits in the cache."""
    mask = torch.tensor([[0] * T, [1] * T])
    with torch.no_grad():
        out = model(ids(), attention_mask=mask, cache=model.new_cache(B))
        assert torch.isfinite(out.logits).all() and out.cache.lengths.tolist() == [0, T]
        alone = model(ids()[1:]).logits
        assert_close(out.logits[1:], alone, 1e-5)
        step = ids(B, 1)
        after = model(step, cache=out.cache).logits
        assert_close(after[:1], model(step[:1]).logits, 1e-5)


# ---------------------------------------------------------------------------------------------------- one row of positions


@pytest.mark.parametrize("mask", [None, [[0, 0, 1, 1, 1, 1], [1] * 6, [1, 1, 1, 1, 1, 0]]], ids=["no padding", "padding"])
@pytest.mark.parametrize("row", [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2], [7, 8, 0, 1, 0, 0]], ids=str)
def test_positions_of_one_row_hold_for_every_row(model, row, mask):
    """[1, T] beside [B, T] ids is what transformers' own position_ids look like."""
    mask = None if mask is None else torch.tensor(mask)
    one = torch.tensor([row])
    with torch.no_grad():
        expected = model(ids(3), position_ids=one.expand(3, -1).contiguous(), attention_mask=mask)
        actual = model(ids(3), position_ids=one, attention_mask=mask)
        assert torch.equal(actual.logits, expected.logits)
        if mask is None:
            alone = torch.cat([model(ids(3)[r : r + 1], position_ids=one).logits for r in range(3)])
            assert_close(actual.logits, alone, 1e-5)


def test_three_axes_of_one_row_hold_for_every_row(model):
    axes = torch.randint(0, 50, (3, 1, T), generator=peer.generator(0))
    for position_ids in (axes, torch.cat([torch.arange(T)[None, None], axes])):  # transformers' four begin with the text's
        with torch.no_grad():
            expected = model(ids(), position_ids=axes.expand(3, B, T).contiguous()).logits
            assert torch.equal(model(ids(), position_ids=position_ids).logits, expected)
