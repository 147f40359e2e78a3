"""Edits of a layer's state by hand: seen by the next forward, rollback, snapshots, clones and files, or refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from qwen35moe import taps
from qwen35moe.cache import Cache
from tests.cache.common import CACHES, CASE, contents, filled, next_logits, same, tokens
from tests.support import peer
from tests.support.peer import FULL, LINEAR, assert_close

EXACT = 1e-12  # of float64: the same operations in another order of tokens


def assign(tensor_name: str, factor: float) -> Callable[[Cache, int], None]:
    def edit(cache: Cache, layer: int) -> None:
        setattr(cache[layer], tensor_name, factor * getattr(cache[layer], tensor_name))

    return edit


def in_place(tensor_name: str, factor: float) -> Callable[[Cache, int], None]:
    def edit(cache: Cache, layer: int) -> None:
        getattr(cache[layer], tensor_name).mul_(factor)

    return edit


def by_index(tensor_name: str, factor: float) -> Callable[[Cache, int], None]:
    def edit(cache: Cache, layer: int) -> None:
        tensor = getattr(cache[layer], tensor_name)
        tensor[:, 0] = factor * tensor[:, 0]

    return edit


def through_data(tensor_name: str, factor: float) -> Callable[[Cache, int], None]:
    def edit(cache: Cache, layer: int) -> None:
        getattr(cache[layer], tensor_name).data.mul_(factor)

    return edit


def augmented(tensor_name: str, factor: float) -> Callable[[Cache, int], None]:
    def edit(cache: Cache, layer: int) -> None:
        view = cache.layers[layer]
        exec(f"view.{tensor_name} *= factor", {}, {"view": view, "factor": factor})

    return edit


EDITS = [assign, in_place, by_index, through_data, augmented]
PLACES = [(0, "recurrent_state"), (2, "conv_state"), (1, "key"), (1, "value")]


def edited_whole(model: Any, edit: Callable[[Cache, int], None], layer: int, prefix: Tensor, rest: Tensor) -> Tensor:
    """The definition: a cache that was never recorded, copied or rolled back, edited and continued in one call."""
    cache = model.new_cache(prefix.shape[0])
    model(prefix, cache=cache)
    edit(cache, layer)
    return model(rest, cache=cache).logits


# Every way on a growing cache, and one way on a static one, in each tensor.
WAYS = [(how, layer, name, None) for how in EDITS for layer, name in PLACES if (name == "key") <= (how is not by_index)]
WAYS += [(how, layer, name, 40) for how in (assign, in_place) for layer, name in PLACES if (name == "value") <= (how is assign)]


@pytest.mark.parametrize("how,layer,name,max_length", WAYS, ids=[f"{w[0].__name__}-{w[2]}-{w[3]}" for w in WAYS])
@torch.no_grad()
def test_an_edit_is_the_state_that_everything_continues_from(double, how, layer, name, max_length):
    """Drafts and rollback, snapshot and restore, clone, deepcopy, pickle, reorder: each gives the logits of the definition."""
    model, edit = double, how(name, 0.25)
    prefix, rest = tokens(2, 7), tokens(2, 4, salt=1)
    expected = edited_whole(model, edit, layer, prefix, rest)
    plain = model(rest, cache=filled(model, 7)).logits
    assert not torch.allclose(expected, plain, rtol=1e-3), "the edit must matter"

    def start() -> Cache:
        cache = model.new_cache(2, max_length, record=5)
        model(prefix[:, :5], cache=cache)
        model(prefix[:, 5:], cache=cache)  # recorded tokens before the edit
        return cache

    cache = start()
    before = cache.snapshot()
    edit(cache, layer)
    after = cache.snapshot()
    model(tokens(2, 3, salt=2), cache=cache)
    cache.rollback(3)
    assert_close(model(rest, cache=cache.clone()).logits, expected, EXACT, "draft and rollback")
    cache.restore(after)
    assert_close(model(rest, cache=copy.deepcopy(cache)).logits, expected, EXACT, "restore after the edit, deepcopy")
    assert_close(model(rest, cache=pickle.loads(pickle.dumps(cache))).logits, expected, EXACT, "pickle")
    cache.restore(before)
    assert_close(model(rest, cache=cache).logits, plain, EXACT, "a snapshot from before the edit")

    cache = start()
    edit(cache, layer)
    cache.reorder([1, 0])
    assert_close(model(rest[[1, 0]], cache=cache).logits[[1, 0]], expected, EXACT, "reorder")
    cache.rollback(4)
    assert_close(model(rest[[1, 0]], cache=cache).logits[[1, 0]], expected, EXACT, "reorder, rollback")


@CACHES
@torch.no_grad()
def test_an_edit_between_drafts_is_the_limit_of_a_rollback(double, max_length):
    model = double
    cache = filled(model, 7, max_length=max_length, record=6)
    model(tokens(2, 2, salt=1), cache=cache)
    cache[0].recurrent_state.mul_(0.5)
    kept = cache.clone()
    model(tokens(2, 2, salt=2), cache=cache)
    with pytest.raises(ValueError, match=r"roll back \[3, 3\].*layer 0 has recorded the last \[2, 2\].*edit"):
        cache.rollback(3)
    assert cache.lengths.tolist() == [11, 11]
    cache.rollback(2)
    assert_close(next_logits(model, cache), next_logits(model, kept), EXACT)


@CACHES
@torch.no_grad()
def test_a_read_alone_costs_no_recorded_token(double, max_length):
    model = double
    cache = filled(model, 7, max_length=max_length, record=4)
    assert all(torch.isfinite(tensor).all() for tensor in contents(cache))
    model(tokens(2, 2, salt=1), cache=cache)
    contents(cache)
    cache.rollback(2)
    assert_close(next_logits(model, cache), next_logits(model, filled(model, 7)), EXACT)


@CACHES
@torch.no_grad()
def test_a_patch_of_the_state_is_an_edit(double, max_length):
    """The state is the patched one; the tokens of that forward cannot be rolled back, those after it can."""
    model = double
    cache = filled(model, 7, max_length=max_length, record=6)
    for function in (lambda s: 0.5 * s, lambda s: s.mul_(0.5)):  # a new tensor, and the one that it got
        with taps.patch(model, {"layers.0.linear_attn.state": function}):
            model(tokens(2, 2, salt=1), cache=cache)
        kept = cache.clone()
        with pytest.raises(ValueError, match="layer 0 has recorded.*patched"):
            cache.rollback(1)
        model(tokens(2, 3, salt=2), cache=cache)
        cache.rollback(3)
        assert_close(next_logits(model, cache.clone()), next_logits(model, kept), EXACT)


@CACHES
@torch.no_grad()
def test_a_view_stays_that_of_its_layer(double, max_length):
    """cache[i] held over a step, a growth, a restore and a reorder."""
    model = double
    cache = model.new_cache(2, max_length and 80)
    keys, state = cache[1], cache[0]
    for length in (5, 60, 9):
        model(tokens(2, length, salt=length), cache=cache)
        assert torch.equal(keys.key, cache[1].key) and keys.key.shape[1] == cache.lengths[0]
    snapshot = cache.snapshot()
    state.recurrent_state = 0 * state.recurrent_state
    assert (cache[0].recurrent_state == 0).all()
    cache.restore(snapshot)
    assert (state.recurrent_state != 0).any()
    cache.reorder([1, 1])
    state.recurrent_state.zero_()
    keys.value.zero_()
    assert (cache[0].recurrent_state == 0).all() and (cache[1].value == 0).all()


@torch.no_grad()
def test_a_tensor_that_the_cache_has_replaced_is_not_edited_in_vain(double):
    """It is an error of the next call, once; reading it is none, and a clone may be edited."""
    model = double
    for layer, name, grow in ((0, "recurrent_state", 1), (2, "conv_state", 1), (1, "key", 60)):
        cache = filled(model, 7)
        tensor = getattr(cache[layer], name)
        own, part = tensor.clone(), tensor[:, 0]
        model(tokens(2, grow, salt=1), cache=cache)
        own.zero_()
        assert torch.isfinite(tensor).all()
        expected = next_logits(model, cache.clone())
        part.zero_()
        with pytest.raises(ValueError, match=rf"cache\[{layer}\].{name} has been edited"):
            model(tokens(2, 1), cache=cache)
        assert torch.equal(next_logits(model, cache), expected)


@torch.no_grad()
def test_keys_that_were_read_before_a_snapshot_are_not_shared_with_it(double):
    for max_length in (None, 40):
        cache = filled(double, 7, max_length=max_length)
        expected = next_logits(double, cache.clone())
        held = [getattr(cache[layer], name) for layer, name in PLACES]
        snapshot = cache.snapshot()
        for tensor in held:
            tensor.mul_(0.5)
        assert not torch.equal(next_logits(double, cache), expected)
        cache.restore(snapshot)
        assert_close(next_logits(double, cache), expected, EXACT)


@torch.no_grad()
def test_snapshots_before_and_after_an_edit_are_both_kept(double):
    """Also of a static cache, whose one buffer holds the values of one of them at a time."""
    for max_length in (None, 40):
        cache = filled(double, 7, max_length=max_length)
        snapshots, expected = [], []
        for factor in (1.0, 0.5, 0.25):
            for layer, name in PLACES:
                getattr(cache[layer], name).mul_(factor)
            snapshots.append(cache.snapshot())
            expected.append(contents(cache))
        for order in ((0, 1, 2), (2, 0, 1), (1, 1, 0)):
            for i in order:
                cache.restore(snapshots[i])
                assert same(contents(cache), expected[i])


# ------------------------------------------------------------------------------------------------------ copies of objects


@CACHES
@torch.no_grad()
def test_copies_of_a_cache_are_caches_of_their_own(model, max_length):
    """deepcopy, copy, pickle and torch.save of a cache with snapshots: the original's snapshots stay valid."""

    def saved(cache: Cache) -> Cache:
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    for copied in (copy.deepcopy, copy.copy, lambda c: pickle.loads(pickle.dumps(c)), saved):
        cache = filled(model, max_length=max_length, record=3)
        snapshot, before = cache.snapshot(), contents(cache)
        other = copied(cache)
        assert same(contents(other), before) and other.lengths.tolist() == [9, 9]
        other.rollback(2)
        model(tokens(2, 4, salt=3), cache=other)
        other[0].recurrent_state.zero_()
        assert same(contents(cache), before)
        model(tokens(2, 1), cache=cache)
        cache.restore(snapshot)
        assert same(contents(cache), before)
        with pytest.raises(ValueError, match="another cache"):
            other.restore(snapshot)


def test_a_cache_on_the_graph_is_copied_and_detached(model):
    ids = tokens(2, 5)
    cache = model(ids, cache=model.new_cache(2)).cache
    assert cache[0].recurrent_state.requires_grad and copy.deepcopy(cache)[1].key.requires_grad
    with torch.no_grad():
        assert cache.clone()[1].key.requires_grad  # it differs from the values of a forward: nothing is cut silently
    assert not pickle.loads(pickle.dumps(cache))[1].key.requires_grad
    assert cache.detach_() is cache and not cache[0].recurrent_state.requires_grad and not cache[1].key.requires_grad
    with torch.no_grad():
        expected = model(tokens(2, 2), cache=filled(model, 5)).logits
    assert_close(model(tokens(2, 2), cache=cache).logits, expected, 1e-5)


def test_a_snapshot_outlives_a_reorder_of_a_growing_cache(model):
    cache = filled(model)
    snapshot, before = cache.snapshot(), contents(cache)
    with torch.no_grad():
        cache.reorder([1, 1, 0])
        model(tokens(3, 2), cache=cache)
        cache.restore(snapshot)
    assert cache.batch_size == 2 and same(contents(cache), before)


def test_a_cache_whose_longest_row_was_dropped(double, tmp_path):
    """It is as long as the longest of the remaining rows, also in a file."""
    ids, mask = tokens(2, 9), torch.tensor([[1] * 9, [0] * 5 + [1] * 4])
    with torch.no_grad():
        cache = double(ids, attention_mask=mask, cache=double.new_cache(2)).cache
        cache.reorder([1])
        assert cache[1].key.shape[1] == 4
        cache.save(tmp_path / "cache.safetensors")
        loaded = Cache.load(tmp_path / "cache.safetensors", double.config.text_config)
        expected = double(ids[1:, 5:], cache=double.new_cache(1)).cache
        for one in (cache, loaded):
            assert_close(next_logits(double, one), next_logits(double, expected.clone()), EXACT)


# ------------------------------------------------------------------------------------------------------ what is refused


def test_values_that_are_no_tensors_and_names_of_the_other_kind(model):
    cache = filled(model)
    with pytest.raises(ValueError, match="int"):
        cache[0].recurrent_state = 0
    with pytest.raises(AttributeError, match="layer 0 is a Gated DeltaNet layer.*conv_state.*not key"):
        _ = cache[0].key
    with pytest.raises(AttributeError, match="layer 1 is an attention layer"):
        _ = cache[1].recurrent_state
    with pytest.raises(AttributeError, match="recurent"):
        cache[0].recurent_state = torch.zeros(1)
    with pytest.raises(ValueError, match="Snapshot"):
        cache.restore(cache)
    with pytest.raises(IndexError):
        cache[3]
    assert cache[-1].state is cache[2].state


def test_a_cache_of_another_model_is_refused(model):
    """The same number of layers, of other kinds or sizes; the same sizes are enough."""
    cache = filled(model)
    for change, words in (({"layer_types": [LINEAR, LINEAR, FULL]}, r"layer_types\[1\]=full_attention.*linear_attention"),
                          ({"head_dim": 36}, r"head_dim=.*36"), ({"linear_value_head_dim": 31}, "linear_value_head_dim=.*31")):
        other = peer.ours(replace(CASE, text=CASE.text | change))
        with pytest.raises(ValueError, match=words + ".*new_cache"):
            other(tokens(2, 1), cache=cache)
    twin = peer.ours(CASE)
    with torch.no_grad():
        assert torch.isfinite(twin(tokens(2, 1), cache=cache).logits).all()


def test_a_static_cache_refuses_a_gradient(model):
    cache = filled(model, max_length=20)
    with pytest.raises(ValueError, match="static.*no_grad"):
        cache[0].recurrent_state = torch.zeros_like(cache[0].recurrent_state).requires_grad_()
    frozen = copy.deepcopy(model).requires_grad_(False)
    embeds = frozen.model.embed_tokens(tokens(2, 2)).requires_grad_()
    with pytest.raises(ValueError, match="static.*no_grad"):
        frozen(inputs_embeds=embeds, cache=cache)
    assert cache.lengths.tolist() == [9, 9]


def test_a_value_of_another_dtype_is_converted(model):
    cache = filled(model)
    cache[0].recurrent_state = cache[0].recurrent_state.double()
    cache[1].key = cache[1].key.bfloat16()
    assert cache[0].recurrent_state.dtype == cache[1].key.dtype == torch.float32
    assert torch.isfinite(next_logits(model, cache)).all()


def test_reprs_are_short(model):
    cache = filled(model, record=2)
    next_logits(model, cache)
    channels = cache[0].conv_state.shape[1]
    texts = [repr(x) for x in (cache, cache[0], cache[1], cache.snapshot(), cache[0].state, cache[0].state.log, cache.layers)]
    assert all(len(text) < 600 for text in texts), texts
    assert f"conv_state [2, {channels}, 2] float32" in texts[1] and "key [2, 11, 3," in texts[2]
    assert CASE.text["layer_types"] and "lengths [11, 11]" in texts[3] and "2 rows" in texts[3]
    assert len(repr(model.new_cache(300))) < 200


@pytest.mark.parametrize("max_length", [None, 40])
@torch.no_grad()
def test_lengths_and_the_rotary_offset_have_one_source(double, max_length):
    """What `lengths`, `rope_delta` and `next_positions` give are copies; an assignment is refused or has effect."""
    prefix, rest = tokens(2, 9), tokens(2, 4, salt=3)
    whole = double(torch.cat([prefix, rest], 1)).logits[:, 9:]
    cache = double.new_cache(2, max_length=max_length)
    double(prefix, cache=cache)
    snapshot = cache.snapshot()
    for tensor in (cache.lengths, cache.next_positions):
        tensor.zero_()
    with pytest.raises(ValueError, match="rollback"):
        cache.lengths = torch.tensor([3, 9])
    with pytest.raises(ValueError, match="rollback"):
        cache.lengths -= 5
    assert cache.lengths.tolist() == [9, 9]
    cache.rope_delta = torch.tensor([2, 2])
    moved = cache.snapshot()
    cache.rope_delta.zero_()  # type: ignore[union-attr]
    positions = torch.cat([torch.arange(9), torch.arange(11, 15)]).expand(2, -1)
    expected = double(torch.cat([prefix, rest], 1), position_ids=positions).logits[:, 9:]
    for state, logits in ((moved, expected), (snapshot, whole), (moved, expected)):
        cache.restore(state)
        assert_close(double(rest, cache=cache).logits, logits, EXACT)
    for wrong in (torch.tensor([2, 2, 2]), torch.tensor([[2], [2]]), torch.tensor([0.5, 2]), 3):
        with pytest.raises(ValueError, match=r"positions are a tensor of integers \[2\]"):
            cache.set_next_positions(wrong)


@pytest.mark.parametrize("max_length", [None, 40])
@torch.no_grad()
def test_a_buffer_of_keys_is_read_with_the_same_precautions(double, max_length):
    prefix, rest = tokens(2, 9), tokens(2, 4, salt=3)
    cache = double.new_cache(2, max_length=max_length)
    double(prefix, cache=cache)
    snapshot = cache.snapshot()
    cache[1].key_buffer.mul_(0.5)
    other = double.new_cache(2)
    double(prefix, cache=other)
    other[1].key = 0.5 * other[1].key
    assert_close(double(rest, cache=cache).logits, double(rest, cache=other).logits, EXACT)
    cache.restore(snapshot)
    assert_close(double(rest, cache=cache).logits, double(torch.cat([prefix, rest], 1)).logits[:, 9:], EXACT)
    for name, value in (("length", 3), ("key_buffer", cache[1].key_buffer), ("static", False)):
        with pytest.raises(ValueError, match=f"{name} cannot be assigned, only key and value"):
            setattr(cache[1], name, value)


WRONG: dict[str, tuple[Callable[[Any, Cache], object], str]] = {
    "rows between rows": (lambda model, cache: cache.reorder([0.5, 1.0]), "not a list of rows 0 ... 1"),  # type: ignore[list-item]
    "rows as a mask": (lambda model, cache: cache.reorder(torch.tensor([True, False])), "not a list of rows"),
    "rows as text": (lambda model, cache: cache.reorder("ab"), "not a list of rows"),  # type: ignore[arg-type]
    "a complex state": (lambda model, cache: setattr(cache[0], "recurrent_state", cache[0].recurrent_state + 1j), "complex"),
    "a state of integers": (lambda model, cache: setattr(cache[1], "key", cache[1].key.long()), "torch.int64"),
    "rows of a cache": (lambda model, cache: model.new_cache(2.0), "batch_size=2.0"),
    "one row as a truth value": (lambda model, cache: model.new_cache(True), "batch_size=True"),
    "a fraction of recorded tokens": (lambda model, cache: model.new_cache(2, record=1.5), "record=1.5"),
    "a fraction of a length": (lambda model, cache: model.new_cache(2, max_length=9.5), "max_length=9.5"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_values_that_would_be_converted_silently_are_refused(name: str, model: Any) -> None:
    call, message = WRONG[name]
    cache = filled(model)
    before = contents(cache)
    with pytest.raises(ValueError, match=message):
        call(model, cache)
    assert all(torch.equal(a, b) for a, b in zip(before, contents(cache), strict=True))


@pytest.mark.parametrize("count", [numpy.int64(3), torch.tensor(3)], ids=["numpy", "tensor"])
@torch.no_grad()
def test_one_number_of_any_kind_rolls_back_every_row(count: Any, double: Any) -> None:
    prefix, rest = tokens(2, 9), tokens(2, 4, salt=3)
    cache = double.new_cache(2, record=4)
    double(prefix, cache=cache)
    cache.rollback(count)
    assert cache.seen == 6 and cache.start() == 6
    logits = double(rest, cache=cache, attention_mask=torch.ones(2, 10)).logits
    assert_close(logits, double(torch.cat([prefix[:, :6], rest], 1)).logits[:, 6:], EXACT)
